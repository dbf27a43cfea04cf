"""The routes of an endpoint on Ray Serve, requested by httpx and by OpenAI's own client."""

from __future__ import annotations

import json
import math
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.errors import UserError
from engine.serve.deploy import Endpoint, deploy
from engine.serve.preflight import check_port_is_free
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import metrics_at_rest, processes, wait_for
from tests.ports import free_port

PROMPTS = [
    "import os\n",
    "def f(x):\n    return",
    "class A:",
    "for i in range(10):\n    print",
    "x = 1\ny = 2\nz",
    "try",
]


def writer_and_namer(tiny: Config, tiny_functions: Config, folder: Path) -> dict[str, Bundle]:
    """Make a causal language model's bundle and a classifier's, with untrained weights."""
    return {
        "writer": fresh_bundle(tiny, folder / "writer" / "bundle"),
        "namer": fresh_bundle(tiny_functions, folder / "namer" / "bundle"),
    }


@pytest.fixture(scope="module")
def bundles(tiny: Config, tiny_functions: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    return writer_and_namer(tiny, tiny_functions, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def endpoint(ray: None, tiny: Config, bundles: dict[str, Bundle]) -> Iterator[Endpoint]:
    options = {"serve.max_body_bytes": 20_000, "serve.max_new_tokens": 100, "serve.max_replicas": 1}  # one cache
    config = with_values(tiny, {"serve.port": free_port(), **options})
    up = deploy(config, {name: bundle.folder for name, bundle in bundles.items()})
    yield up
    up.stop()


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        yield client


def greedy(bundle: Bundle, prompt: str, tokens: int) -> str:
    (response,) = bundle.objective().predict(bundle.model(), [{"prompt": prompt, "max_tokens": tokens}])
    return str(response["text"])


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"temperature": 0, **body})
    assert response.status_code == 200, response.text
    completion: dict[str, Any] = response.json()
    return completion


def test_health_and_models(client: httpx.Client, bundles: dict[str, Bundle]) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").json() == {"status": "ready", "models": ["namer", "writer"]}
    assert {model["id"]: model["hash"] for model in client.get("/v1/models").json()["data"]} == {
        n: b.hash for n, b in bundles.items()
    }
    assert "/v1/completions" in client.get("/openapi.json").json()["paths"]


def test_classify_returns_the_objectives_predictions(client: httpx.Client, bundles: dict[str, Bundle]) -> None:
    texts = ["return self.x", "for i in values:\n    total += i"]
    response = client.post("/v1/classify", json={"model": "namer", "input": texts}).json()
    bundle = bundles["namer"]
    expected = bundle.objective().predict(bundle.model(), [{"text": text} for text in texts])
    assert [row["label"] for row in response["data"]] == [row["label"] for row in expected]
    for row, prediction in zip(response["data"], expected, strict=True):
        assert list(row["scores"].values()) == pytest.approx(list(prediction["scores"].values()), abs=1e-5)
    assert client.post("/v1/classify", json={"input": texts[0]}).json()["data"][0]["label"] == expected[0]["label"]


def test_greedy_completions_equal_generate_alone_and_batched(client: httpx.Client, bundles: dict[str, Bundle]) -> None:
    lengths = [5, 40, 12, 30, 3, 24]
    expected = [greedy(bundles["writer"], prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert [
        complete(client, prompt=p, max_tokens=n)["choices"][0]["text"] for p, n in zip(PROMPTS, lengths, strict=True)
    ] == expected
    with ThreadPoolExecutor(6) as pool:
        responses = pool.map(
            lambda pair: complete(client, prompt=pair[0], max_tokens=pair[1]), zip(PROMPTS, lengths, strict=True)
        )
    assert [response["choices"][0]["text"] for response in responses] == expected
    together = complete(client, prompt=PROMPTS, max_tokens=8)
    assert [c["text"] for c in together["choices"]] == [greedy(bundles["writer"], p, 8) for p in PROMPTS]
    ids = bundles["writer"].processor()(PROMPTS[1])["input_ids"]
    response = complete(client, prompt=ids, max_tokens=40, echo=True)
    assert response["choices"][0]["text"] == PROMPTS[1] + expected[1]
    usage = {"prompt_tokens": len(ids), "completion_tokens": 40, "total_tokens": len(ids) + 40}
    assert response["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": len(ids) - 1}}


def test_a_stream_has_the_same_text(client: httpx.Client) -> None:
    whole = complete(client, prompt=PROMPTS[1], max_tokens=20)
    with client.stream(
        "POST", "/v1/completions",
        json={"prompt": PROMPTS[1], "max_tokens": 20, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}},
    ) as response:  # fmt: skip
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == whole["choices"][0]["text"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 20


def test_a_seed_repeats_in_any_batch(client: httpx.Client) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    alone = complete(client, **body)["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(complete, client, prompt=p, max_tokens=30, temperature=1.0) for p in PROMPTS[1:4]]
        assert complete(client, **body)["choices"][0]["text"] == alone
        for other in others:
            other.result()
    two = complete(client, **body | {"n": 2})["choices"]
    assert two[0]["text"] == alone != two[1]["text"]


def test_a_temperature_near_zero_is_greedy(client: httpx.Client) -> None:
    whole = complete(client, prompt=PROMPTS[1], max_tokens=10)["choices"][0]["text"]
    assert complete(client, prompt=PROMPTS[1], max_tokens=10, temperature=1e-40)["choices"][0]["text"] == whole


def test_a_stop_text_ends_a_completion(client: httpx.Client) -> None:
    whole = complete(client, prompt=PROMPTS[1], max_tokens=30)["choices"][0]["text"]
    word = whole[8:11]
    stopped = complete(client, prompt=PROMPTS[1], max_tokens=30, stop=word)["choices"][0]
    assert stopped["text"] == whole[: whole.index(word)]
    assert stopped["finish_reason"] == "stop"


def model_logprobs(bundle: Bundle, ids: list[int]) -> torch.Tensor:
    """Return the model's log-probabilities [tokens, vocabulary] after each token."""
    with torch.no_grad():
        logprobs: torch.Tensor = bundle.model()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_prompts_have_logprobs_as_lm_eval_expects(
    client: httpx.Client, bundles: dict[str, Bundle], max_tokens: int
) -> None:
    tokenizer = bundles["writer"].processor()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:4]]
    body = {"prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    response = complete(client, **body)
    assert len(response["choices"]) == 4
    for ids, choice in zip(prompts, response["choices"], strict=True):
        logprobs, expected = choice["logprobs"], model_logprobs(bundles["writer"], ids)
        assert logprobs["token_logprobs"][0] is None
        scores = logprobs["token_logprobs"][1 : len(ids)]
        assert scores == pytest.approx([float(expected[i, token]) for i, token in enumerate(ids[1:])], abs=1e-4)
        greedy_tokens = [max(top, key=top.get) == token for token, top in zip(logprobs["tokens"][1 : len(ids)], logprobs["top_logprobs"][1 : len(ids)], strict=True)]  # fmt: skip
        assert greedy_tokens == (expected[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist()
        assert len(logprobs["tokens"]) == len(ids) + max_tokens  # the end token counts
        assert choice["text"].startswith(tokenizer.decode(ids))
        offsets = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
        assert all(
            choice["text"][at:].startswith(token)
            for token, at in offsets
            if token.isascii() and token != tokenizer.eos_token
        )
    assert response["usage"]["completion_tokens"] <= 4 * max_tokens


def test_the_end_token_has_a_logprob(client: httpx.Client, bundles: dict[str, Bundle]) -> None:
    tokenizer = bundles["writer"].processor()
    ids, end = tokenizer(PROMPTS[1])["input_ids"], tokenizer.eos_token_id
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "logit_bias": {str(end): 100}}
    response = complete(client, **body)
    logprobs, expected = response["choices"][0]["logprobs"], model_logprobs(bundles["writer"], ids)
    assert (response["choices"][0]["finish_reason"], response["usage"]["completion_tokens"]) == ("stop", 0)
    assert (len(logprobs["tokens"]), logprobs["tokens"][-1]) == (len(ids) + 1, tokenizer.eos_token)
    assert logprobs["token_logprobs"][-1] == pytest.approx(float(expected[-1, end]), abs=1e-4)


def test_streamed_logprobs_equal_the_whole_ones(client: httpx.Client) -> None:
    body = {"prompt": PROMPTS[1], "max_tokens": 12, "temperature": 0, "logprobs": 2, "echo": True}
    whole = complete(client, **body)["choices"][0]
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, values in whole["logprobs"].items():
        streamed = [value for choice in choices for value in choice["logprobs"][name]]
        if name == "token_logprobs":
            assert streamed[0] is values[0] is None
            assert streamed[1:] == pytest.approx(values[1:], abs=1e-4)
        elif name != "top_logprobs":
            assert streamed == values


def test_a_chat_completes_its_template(client: httpx.Client, bundles: dict[str, Bundle]) -> None:
    messages = [{"role": "system", "content": "Say it."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    prompt = "system: Say it.\nuser: Hi\nassistant:"
    expected = complete(client, prompt=prompt, max_tokens=20)
    body = {"messages": messages, "max_completion_tokens": 20, "temperature": 0}
    response = client.post("/v1/chat/completions", json=body).json()
    assert response["object"] == "chat.completion"
    assert response["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    assert response["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    long = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0}).json()
    assert long["choices"][0]["finish_reason"] in ("length", "stop")
    assert long["usage"]["total_tokens"] <= 128
    refused = client.post("/v1/chat/completions", json={"messages": [{"role": "king", "content": "x"}]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_embeddings_are_the_mean_of_the_last_hidden_states(client: httpx.Client, bundles: dict[str, Bundle]) -> None:
    for name in ("writer", "namer"):
        bundle = bundles[name]
        rows = client.post("/v1/embeddings", json={"model": name, "input": PROMPTS[:3]}).json()
        for prompt, row in zip(PROMPTS, rows["data"], strict=False):
            ids = torch.tensor([bundle.processor()(prompt)["input_ids"]])
            with torch.no_grad():
                mean = bundle.model().base_model(input_ids=ids).last_hidden_state[0].mean(0)
            assert row["embedding"] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-4)
        assert rows["usage"]["prompt_tokens"] > 3
    refused = client.post("/v1/embeddings", json={"model": "writer", "input": "word " * 300})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")


def test_scores_are_cosines_of_embeddings(client: httpx.Client) -> None:
    texts = ["x = 1", "import os", "x = 2"]
    rows = client.post("/v1/embeddings", json={"model": "namer", "input": texts}).json()["data"]
    vectors = torch.tensor([row["embedding"] for row in rows])

    def score(**body: Any) -> httpx.Response:
        return client.post("/v1/score", json={"model": "namer", **body})

    single, pairs = score(text_1=texts[0], text_2=texts).json(), score(text_1=texts[:2], text_2=texts[1:]).json()
    assert [row["score"] for row in single["data"]] == pytest.approx((vectors @ vectors[0]).tolist(), abs=1e-5)
    assert single["data"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert [row["score"] for row in pairs["data"]] == pytest.approx((vectors[:2] * vectors[1:]).sum(1).tolist(), abs=1e-5)  # fmt: skip
    assert single["usage"] == client.post("/v1/embeddings", json={"model": "namer", "input": texts}).json()["usage"]
    refused = score(text_1=texts[:2], text_2=texts)
    assert refused.status_code == 400
    assert "text_1 holds 2 texts and text_2 3" in refused.json()["error"]["message"]
    assert score(text_1="x", text_2="x " * 400).json()["error"]["param"] == "text_2"


def test_openais_client(endpoint: Endpoint, client: httpx.Client) -> None:
    import openai

    api = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none")
    whole = complete(client, prompt=PROMPTS[2], max_tokens=10)["choices"][0]["text"]
    response = api.completions.create(model="writer", prompt=PROMPTS[2], max_tokens=10, temperature=0)
    assert response.choices[0].text == whole
    stream = api.completions.create(model="writer", prompt=PROMPTS[2], max_tokens=10, temperature=0, stream=True)
    assert "".join(event.choices[0].text for event in stream) == whole
    assert {model.id for model in api.models.list()} == {"writer", "namer"}
    messages: Any = [{"role": "user", "content": "x = 1"}]
    chat = api.chat.completions.create(model="writer", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2)  # fmt: skip
    output = chat.choices[0].message.content
    assert chat.choices[0].logprobs
    joined = b"".join(bytes(entry.bytes or []) for entry in chat.choices[0].logprobs.content or [])
    assert joined.decode(errors="replace") == output
    parts = api.chat.completions.create(
        model="writer", messages=messages, max_tokens=8, temperature=0, n=2, stream=True
    )
    texts = {0: "", 1: ""}
    for event in parts:
        texts[event.choices[0].index] += event.choices[0].delta.content or ""
    assert set(texts.values()) == {output}
    vector = api.embeddings.create(model="writer", input=["x = 1", "y"]).data[0].embedding
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        api.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "temperature": math.nan}, 400, "temperature"),
        ({"prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"prompt": "x", "max_tokens": -5}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": 101}, 400, "max_tokens"),
        ({"prompt": "word " * 200}, 400, "max_tokens"),
        ({"prompt": [1, 2, 512]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({}, 400, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, 400, None),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "x", "top_k": -1}, 400, "top_k"),
        ({"prompt": "x", "frequency_penalty": 3}, 400, "frequency_penalty"),
        ({"prompt": "x", "logit_bias": {"900": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "stream": True, "prompts": 1}, 400, "prompts"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": "x", "model": "namer"}, 400, "model"),
        ({"prompt": "x" * 30_000}, 413, None),
    ],
)
def test_invalid_requests_get_openais_error_body(
    client: httpx.Client, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = client.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"]
    assert complete(client, prompt="x", max_tokens=1)["choices"][0]["finish_reason"]


def test_malformed_json_and_unknown_paths(client: httpx.Client) -> None:
    response = client.post("/v1/completions", content='{"prompt": ', headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    no_type = client.post("/v1/completions", content=b"{")  # without a content type
    assert (no_type.status_code, no_type.json()["error"]["type"]) == (400, "invalid_request_error")
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


def test_requests_are_counted(client: httpx.Client) -> None:
    def count() -> float:
        labels = ("manta_requests_total{", 'model="writer"', 'path="/v1/completions"', 'status="200"')
        return sum(
            float(line.rpartition(" ")[2])
            for line in metrics_at_rest(str(client.base_url))
            if all(label in line for label in labels)
        )

    before = count()
    complete(client, prompt="x", max_tokens=1)
    assert count() == before + 1


def test_requests_use_sockets_to_the_replicas(client: httpx.Client) -> None:
    def socket_requests(model: str) -> float:
        labels = ("manta_replica_lane_requests_total{", f'model="{model}"')
        lines = metrics_at_rest(str(client.base_url))
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in labels))

    def all_use_sockets() -> bool:  # once the ingress has found the replicas
        before = {model: socket_requests(model) for model in ("writer", "namer")}
        client.post("/v1/classify", json={"input": "x = 1"}).raise_for_status()
        complete(client, prompt="x", max_tokens=1)
        with client.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        time.sleep(1.0)  # the age of polled stats
        return {model: socket_requests(model) - count for model, count in before.items()} == {"writer": 2, "namer": 1}

    wait_for(all_use_sockets)
    assert not processes("ProxyActor")


def test_a_tampered_bundle_is_refused(ray: None, tiny: Config, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundles["writer"].folder, tmp_path / "bundle"))
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match=r"tokenizer\.json was changed"):
        deploy(with_values(tiny, {"serve.port": free_port()}), {"writer": copy})


def test_a_port_in_use_names_its_process_and_a_free_port() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"serve.port {port} is in use by .*, process \d+: use serve.port=\d+"):
            check_port_is_free(port)

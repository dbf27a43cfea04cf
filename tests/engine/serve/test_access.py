"""A real endpoint with keys: who is let in, what is kept and counted, and what its clients see."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.serve.deploy import Endpoint, deploy
from engine.serve.http.api_keys import new_key, revoke_key
from engine.serve.http.feedback_store import read_records
from tests.engine.bundles.making import fresh_bundle
from tests.engine.serve.clients import metrics_at_rest, processes, wait_for
from tests.engine.serve.test_structure import SCHEMA, form
from tests.ports import free_port

ROOT = Path(__file__).parents[3]
ORIGIN = "https://friend.example"
SECRET = "sk-Abcdefghijklmnop1234"  # a form that masking knows


@dataclass(frozen=True)
class Guarded:
    """An endpoint and the secrets of its keys."""

    endpoint: Endpoint
    config: Config
    secrets: dict[str, str]

    @property
    def url(self) -> str:
        return self.endpoint.url

    def header(self, name: str = "alice") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[name]}"}

    def post(self, path: str, key: str = "alice", headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers=self.header(key) | (headers or {}), timeout=60)

    def openai(self, key: str = "alice") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.secrets[key], max_retries=0)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def sum(self, name: str, *labels: str) -> float:
        """Sum a metric over all label sets that hold these texts."""
        found = self.metrics().items()
        return sum(value for key, value in found if key.partition("{")[0] == name and all(it in key for it in labels))

    def log(self) -> list[dict[str, Any]]:
        lines = (self.config.run_dir / "logs" / "access.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def guarded(
    ray: None, tiny: Config, tiny_functions: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    bundles = {
        "writer": fresh_bundle(tiny, folder / "writer" / "bundle").folder,
        "namer": fresh_bundle(tiny_functions, folder / "namer" / "bundle").folder,
    }
    config = with_values(
        tiny,
        {"runs_dir": str(folder), "name": "guarded", "serve.port": free_port(), "serve.max_body_bytes": 50_000,
         "serve.origins": [ORIGIN], "serve.log_prompts": True, "serve.body_timeout_s": 4.0, "serve.max_replicas": 1},
    )  # fmt: skip
    limits: dict[str, tuple[int | None, int | None, float | None]] = {
        "alice": (None, None, 1), "bob": (3, None, None), "carol": (None, 120, None), "dave": (None, None, 1e-9),
        "erin": (None, None, None),
    }  # fmt: skip
    secrets = {name: new_key(config.keys_file, name, *limit)[0] for name, limit in limits.items()}
    up = deploy(config, bundles)
    yield Guarded(up, config, secrets)
    up.stop()


def test_whoever_asks_shows_a_key(guarded: Guarded) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json", "/page/page.js"):
        assert httpx.get(guarded.url + path).status_code == 200, path
    shown = {
        "": "missing_api_key",
        "Basic YTpi": "missing_api_key",
        "Bearer": "missing_api_key",
        "Bearer sk-manta-wrong": "invalid_api_key",
        f"Bearer {guarded.secrets['dave']}": "invalid_api_key",
    }
    for header, code in shown.items():
        for path in ("/v1/models", "/v1/nothing", "/nothing"):
            answer = httpx.get(guarded.url + path, headers={"Authorization": header})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "'dave' is expired" in httpx.get(f"{guarded.url}/v1/models", headers=guarded.header("dave")).text
    assert httpx.get(f"{guarded.url}/v1/models", headers=guarded.header()).status_code == 200
    assert httpx.post(f"{guarded.url}/v1/completions", content=b"{").status_code == 401
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-manta-other", max_retries=0).models.list()


def test_a_revoked_key_opens_nothing_any_more(guarded: Guarded) -> None:
    ask = lambda: httpx.get(f"{guarded.url}/v1/models", headers=guarded.header("erin")).status_code  # noqa: E731
    assert ask() == 200
    revoke_key(guarded.config.keys_file, "erin")
    wait_for(lambda: ask() == 401)


def test_a_key_asks_as_often_as_it_may(guarded: Guarded) -> None:
    guarded.post("/v1/classify", "alice", model="namer", input="x")  # and now it is warm
    began = time.monotonic()
    answers = [guarded.post("/v1/classify", "bob", model="namer", input="x") for _ in range(4)]
    took = time.monotonic() - began
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 20 - took <= int(answers[-1].headers["Retry-After"]) <= 20  # one each 20 s
    error = answers[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "over this key's 3 requests a minute" in error["message"]
    with pytest.raises(openai.RateLimitError):
        guarded.openai("bob").completions.create(model="writer", prompt="x")
    assert len(guarded.openai("bob").models.list().data) == 2
    assert guarded.post("/v1/classify", "alice", model="namer", input="x").status_code == 200


def test_a_key_uses_as_many_tokens_as_it_may(guarded: Guarded) -> None:
    def ask() -> httpx.Response:
        body = {"model": "writer", "prompt": [7, 8], "max_tokens": 100, "logit_bias": {"0": -100}}
        return guarded.post("/v1/completions", "carol", **body)

    began = time.monotonic()
    first, refused = ask(), ask()
    took = time.monotonic() - began
    assert (first.status_code, refused.status_code) == (200, 429)
    assert first.json()["usage"]["total_tokens"] == 102
    assert "120 tokens a minute" in refused.json()["error"]["message"]
    assert 42 - took <= int(refused.headers["Retry-After"]) <= 42  # 18 are left, and two come each second


def test_pages_elsewhere_may_ask_only_where_they_are_named(guarded: Guarded) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = httpx.options(f"{guarded.url}/v1/completions", headers={"Origin": ORIGIN} | asked)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    other = httpx.options(f"{guarded.url}/v1/completions", headers={"Origin": "https://foe.example"} | asked)
    assert (other.status_code, other.headers.get("Access-Control-Allow-Origin")) == (400, None)
    answer = httpx.get(f"{guarded.url}/v1/models", headers=guarded.header() | {"Origin": ORIGIN})
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "x-request-id" in answer.headers["Access-Control-Expose-Headers"].lower()


def test_a_request_is_known_by_its_id(guarded: Guarded) -> None:
    prompt = f"mail bob@example.com the key {SECRET}"
    answer = guarded.post(
        "/v1/completions", headers={"X-Request-Id": "my-1"}, model="writer", prompt=prompt, max_tokens=5
    )
    assert answer.headers["X-Request-Id"] == "my-1"
    assert answer.json()["id"] == "cmpl-my-1"
    own = guarded.post("/v1/classify", model="namer", input="x")
    assert own.json()["id"] == own.headers["X-Request-Id"]
    wait_for(lambda: any(line["request"] == own.headers["X-Request-Id"] for line in guarded.log()))
    (line,) = [line for line in guarded.log() if line["request"] == "my-1"]
    usage = answer.json()["usage"]
    assert (line["status"], line["key"], line["model"], line["path"]) == (200, "alice", "writer", "/v1/completions")
    assert (line["read"], line["written"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert line["prompts"] == ["mail <email> the key <secret>"]
    assert 0 < line["milliseconds"] < 60_000


def test_no_key_is_written_down_anywhere(guarded: Guarded) -> None:
    guarded.post("/v1/completions", model="writer", prompt="x", max_tokens=0)
    texts = [path.read_text(errors="replace") for path in guarded.config.run_dir.rglob("*") if path.is_file()]
    texts += [path.read_text(errors="replace") for path in ray_logs() if path.is_file()]
    texts.append(httpx.get(f"{guarded.url}/metrics").text)
    assert len(texts) > 5
    assert not [name for name, secret in guarded.secrets.items() if any(secret in text for text in texts)]


def ray_logs() -> Iterator[Path]:
    import ray

    context: Any = ray._private.worker.global_worker.node
    return Path(context.get_session_dir_path(), "logs").rglob("*")


def test_metrics_tell_of_requests_and_replicas(guarded: Guarded) -> None:
    names = ('model="writer"', 'key="alice"')
    metrics_at_rest(guarded.url)
    before = guarded.metrics()
    body = {"model": "writer", "prompt": [7, 8, 9], "max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100}}
    used = [guarded.post("/v1/completions", **body).json()["usage"] for _ in range(2)]
    with httpx.stream("POST", f"{guarded.url}/v1/completions", json=body | {"stream": True}, headers=guarded.header()) as stream:  # fmt: skip
        stream.read()
    wait_for(lambda: guarded.metrics() != before)

    def more(name: str, *labels: str) -> float:
        gone = sum(value for key, value in before.items() if key.partition("{")[0] == name and all(it in key for it in labels))  # fmt: skip
        return guarded.sum(name, *labels) - gone

    wait_for(lambda: more("manta_requests_total", *names, 'path="/v1/completions"', 'status="200"') == 3)
    written = sum(it["completion_tokens"] for it in used) * 3 / 2
    assert more("manta_tokens_total", *names, 'kind="completion"') == written
    assert more("manta_tokens_total", *names, 'kind="prompt"') == 9
    assert more("manta_tokens_total", *names, 'kind="cached"') >= 4
    for name in ("manta_first_token_seconds", "manta_between_tokens_seconds", "manta_queue_seconds"):
        assert more(f"{name}_count", *names) == 3
    first, whole = more("manta_first_token_seconds_sum", *names), more("manta_request_seconds_sum", *names)
    assert 0 < first < whole
    assert more("manta_between_tokens_seconds_sum", *names) * (written / 3 - 1) < whole
    assert more("manta_requests_total", 'status="401"') == 0
    httpx.get(f"{guarded.url}/v1/models")
    assert more("manta_requests_total", 'status="401"') == 1
    # Replicas are asked again and again, and those that are busy may not tell in time.
    wait_for(lambda: guarded.sum("manta_replicas", 'model="namer"') == 1)
    wait_for(lambda: more("manta_replica_forwards_total", 'model="writer"') >= 20)
    wait_for(lambda: guarded.sum("manta_replica_cache_tokens") > 0)
    wait_for(lambda: guarded.sum("manta_replica_running") == 0)
    models = httpx.get(f"{guarded.url}/v1/models", headers=guarded.header()).json()["data"]

    def versions() -> set[tuple[str, str]]:
        replicas = httpx.get(f"{guarded.url}/v1/replicas", headers=guarded.header()).json()["data"]
        return {(it["model"], it["version"]) for it in replicas}

    wait_for(lambda: versions() == {(it["id"], it["hash"][:12]) for it in models})


def test_the_dashboard_asks_for_what_there_is(guarded: Guarded) -> None:
    guarded.post("/v1/completions", model="writer", prompt="x", max_tokens=2)
    told = set(re.findall(r"^# TYPE (\w+)", httpx.get(f"{guarded.url}/metrics").text, re.MULTILINE))
    there = told | {f"{name}{end}" for name in told for end in ("_bucket", "_count", "_sum", "_total")}
    board = json.loads((ROOT / "engine/serve/dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [it["query"] for it in board["templating"]["list"] if it["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"manta_\w+", query)}
    assert len(asked) > 12
    assert asked <= there
    labels = {label for key in guarded.metrics() for label in re.findall(r'(\w+)="', key)}
    by = {
        label.strip()
        for query in queries
        for group in re.findall(r"by \(([^)]*)\)", query)
        for label in group.split(",")
    }
    assert by <= labels | {"rating", "kind"}


def test_openais_client_finds_each_of_its_options(guarded: Guarded) -> None:
    api = guarded.openai()
    ids = Bundle.open(Path(guarded.config.runs_dir) / "writer" / "bundle").processor()("x = 1")["input_ids"]

    def ask(**options: Any) -> Any:
        given = {"model": "writer", "prompt": "x = 1", "max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100}}
        return api.completions.create(**(given | options))

    def text(**options: Any) -> str:
        return str(ask(**options).choices[0].text)

    whole = text()
    word = whole[4:6]
    assert text(stop=[word, "never said"]) == whole[: whole.index(word)]
    assert text(echo=True) == "x = 1" + whole
    assert text(prompt=ids) == whole
    assert [choice.text for choice in ask(prompt=[ids, ids]).choices] == [whole, whole]
    assert [choice.text for choice in ask(prompt=["x = 1", "y"], n=2).choices][:2] == [whole, whole]
    assert text(temperature=2, extra_body={"top_k": 1}) == text(temperature=2, top_p=1e-9) == whole
    drawn = {"temperature": 1.5, "seed": 3}
    assert text(**drawn) == text(**drawn) != text(**drawn | {"seed": 4})
    pulled = ask(logit_bias={"0": -100, "77": 100}, max_tokens=8, logprobs=2)
    assert pulled.choices[0].logprobs.tokens == pulled.choices[0].logprobs.tokens[:1] * 8
    assert [len(top) in (2, 3) for top in pulled.choices[0].logprobs.top_logprobs] == [True] * 8
    pushed = ask(logit_bias={"0": -100, "77": 100}, max_tokens=120, frequency_penalty=2, presence_penalty=2, logprobs=0)
    assert len(set(pushed.choices[0].logprobs.tokens)) > 1  # by the fiftieth time, 100 are taken off again
    last = list(ask(stream=True, stream_options={"include_usage": True}))[-1]
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 20, len(ids))
    chat: Callable[..., Any] = api.chat.completions.create
    said = chat(model="writer", messages=[{"role": "user", "content": "x"}], max_completion_tokens=7)
    assert said.usage.completion_tokens <= 7
    with pytest.raises(openai.BadRequestError) as caught:
        ask(temperature=3)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")


def test_answers_have_the_form_that_is_asked_for(guarded: Guarded) -> None:
    api = guarded.openai()
    talk: Any = [{"role": "user", "content": "a cat, please"}]
    response_format: Any = form(SCHEMA)
    ask: Callable[..., Any] = api.chat.completions.create
    whole = ask(model="writer", messages=talk, max_tokens=100, temperature=1.0, seed=5, n=2, response_format=response_format)  # fmt: skip
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    parts = ask(model="writer", messages=talk, max_tokens=100, temperature=1.0, seed=5, stream=True, response_format=response_format)  # fmt: skip
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    assert streamed == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="cannot be followed") as caught:
        ask(model="writer", messages=talk, response_format=form({"type": "objekt"}))
    assert caught.value.param == "response_format"
    text = ask(model="writer", messages=talk, max_tokens=3, temperature=0, response_format={"type": "text"})
    assert text.choices[0].message.content


def test_what_no_model_here_does_is_told(guarded: Guarded) -> None:
    api = guarded.openai()
    with pytest.raises(openai.NotFoundError, match="no model here makes images; there are namer"):
        api.images.generate(model="writer", prompt="a cat")
    with pytest.raises(openai.NotFoundError, match="no model here hears speech"):
        api.audio.transcriptions.create(model="writer", file=("a.wav", b"RIFF"))


def test_feedback_and_requests_that_may_be_kept_are(guarded: Guarded) -> None:
    folder = guarded.config.run_dir / "feedback"
    kept = guarded.post("/v1/classify", model="namer", input=["def f(): pass"], store=True).json()
    assert guarded.post("/v1/classify", model="namer", input="not to be kept").status_code == 200
    stream = guarded.openai().chat.completions.create(
        model="writer", messages=[{"role": "user", "content": "Hi"}], max_tokens=9, stream=True, store=True
    )
    parts = list(stream)
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    records = read_records(folder, "requests").to_pylist()
    assert [it["path"] for it in records] == ["/v1/classify", "/v1/chat/completions"]
    assert records[0]["request"] == kept["id"]
    assert json.loads(records[0]["output"])[0]["label"] == kept["data"][0]["label"]
    assert json.loads(records[1]["output"])[0]["text"] == said
    assert json.loads(records[1]["input"])["messages"][0]["content"] == "Hi"
    assert records[1]["version"]
    told = guarded.post("/v1/feedback", request=kept["id"], rating="down", label="json")
    assert told.json() == {"object": "feedback", "request": kept["id"], "model": "namer", "stored": True}
    guarded.post("/v1/feedback", request=parts[0].id, rating="up")
    guarded.post("/v1/feedback", request="from-before-a-restart", text="better")
    found = read_records(folder, "feedback").to_pylist()
    assert [(it["model"], it["rating"], it["label"], it["text"]) for it in found] == [
        ("namer", -1, "json", None), ("writer", 1, None, None), ("", None, None, "better"),
    ]  # fmt: skip
    assert f"chatcmpl-{found[1]['request']}" == parts[0].id
    assert guarded.sum("manta_feedback_total", 'model="namer"', 'rating="down"') == 1
    assert guarded.post("/v1/feedback", "carol", request=kept["id"], rating="up").status_code == 404
    for body in ({}, {"request": kept["id"]}, {"request": "a b", "rating": "up"}, {"request": "x", "rating": "good"}):
        assert guarded.post("/v1/feedback", **body).status_code == 400


def test_clients_that_left_keep_nothing(guarded: Guarded) -> None:
    body = {"model": "writer", "prompt": "x", "max_tokens": 120, "n": 16, "logit_bias": {"0": -100}}

    async def leave(stream: bool) -> None:
        async with httpx.AsyncClient(headers=guarded.header()) as client:
            asking = asyncio.create_task(client.post(f"{guarded.url}/v1/completions", json=body | {"stream": stream}))
            await asyncio.sleep(0.15)
            asking.cancel()

    for stream in (True, False):
        asyncio.run(leave(stream))
    answer = guarded.post("/v1/completions", model="writer", prompt="y", max_tokens=2)
    assert answer.status_code == 200
    wait_for(lambda: guarded.sum("manta_replica_running") + guarded.sum("manta_replica_waiting") == 0)
    metrics_at_rest(guarded.url)


def memory_of(name: str) -> int:
    """Return the resident bytes of Serve's processes of that name."""
    return sum(it.memory_info().rss for it in processes(name))


def test_idle_and_slow_clients_harm_nobody(guarded: Guarded) -> None:
    host, port = "127.0.0.1", guarded.config.serve.port
    start = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {guarded.secrets['alice']}\r\nContent-Type: application/json\r\n"
    before = memory_of("ServeReplica:manta:api")
    assert before
    idle = []
    try:
        for i in range(1000):
            connection = socket.create_connection((host, port), timeout=30)
            idle.append(connection)
            if i % 2:
                connection.sendall(f"{start}Content-Length: 1000\r\n\r\n{{".encode())  # and nothing more
        answer = guarded.post("/v1/completions", model="writer", prompt="x", max_tokens=3)
        assert answer.status_code == 200
        told = idle[-1].recv(1000)
        assert b" 408 " in told.partition(b"\r\n")[0]
        grown = memory_of("ServeReplica:manta:api") - before
        assert grown < 200 * 2**20
    finally:
        for connection in idle:
            connection.close()
    body = json.dumps(
        {"model": "writer", "prompt": "x", "max_tokens": 120, "n": 16, "stream": True, "temperature": 1.5}
    )
    reader = socket.create_connection((host, port))
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.sendall(f"{start}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    wait_for(lambda: guarded.sum("manta_replica_running") == 0)  # its lanes wait for no reader
    assert guarded.post("/v1/completions", model="writer", prompt="x", max_tokens=3).status_code == 200
    reader.close()


def test_huge_and_mad_bodies_get_a_4xx(guarded: Guarded) -> None:
    huge = json.dumps({"model": "writer", "prompt": "x" * 10_000_000}).encode()

    def post(body: bytes) -> httpx.Response:
        headers = guarded.header() | {"Content-Type": "application/json"}
        return httpx.post(f"{guarded.url}/v1/completions", content=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, [huge] * 16))
        assert {answer.status_code for answer in answers} == {413}

        def chunks() -> Iterator[bytes]:
            yield from (huge[i : i + 65536] for i in range(0, len(huge), 65536))

        with httpx.Client() as client:
            assert (
                client.post(f"{guarded.url}/v1/completions", content=chunks(), headers=guarded.header()).status_code
                == 413
            )
        mad = [
            b"", b"null", b"[]", b"3", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"model": "\\ud800", "prompt": "x"}',
            b'{"prompt": "x", "model": "writer", "user": "\\udfff"}', b'{"prompt": "x", "stop": ["\\ud800"]}', b"[" * 20_000,
            b'{"prompt": ' + b"[" * 20_000, b'{"prompt": "x", "seed": ' + b"9" * 20_000 + b"}", b'{"prompt": "x", "temperature": NaN}',
            b'{"prompt": "x", "top_p": Infinity}', b'{"prompt": [1e400]}', b'{"prompt": [-1]}', b'{"prompt": [99999999999999999999]}',
            b'{"prompt": [true]}', b'{"prompt": "x", "n": 1.5}', b'{"prompt": "x", "max_tokens": null}', b'{"prompt": "x", "logit_bias": {"-1": 1}}',
            b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"model": "writer", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ' + b'{"not":' * 800 + b"{}" + b"}" * 800 + b"}}}",
            b'{"prompt": "x", "logit_bias": {"\xc2\xb2": 1}}', b'{"prompt": "x", "model": "a\\u0000b"}',
            b'{"prompt": "x", "model": "writer", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}}',
        ]  # fmt: skip
        for body, answer in zip(mad, pool.map(post, mad), strict=True):
            assert 400 <= answer.status_code < 500, (body[:80], answer.status_code, answer.text)
            assert answer.json()["error"]["message"]
    assert guarded.post("/v1/completions", model="writer", prompt="x\x00y", max_tokens=3).status_code == 200


def test_the_interface_is_shown_offline(guarded: Guarded) -> None:
    for page in ("/docs", "/"):
        text = httpx.get(guarded.url + page).text
        asked = re.findall(r'(?:src|href)="([^"#]+)"', text)
        assert asked
        for link in asked:
            assert not link.startswith(("http:", "https:", "//")), link
            if not link.startswith("data:"):
                assert httpx.get(f"{guarded.url}/{link.lstrip('/')}").status_code == 200, link
    assert httpx.get(f"{guarded.url}/page/..%2Fapi.py").status_code == 404


def test_no_request_of_the_schema_ends_in_a_5xx(guarded: Guarded) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{guarded.url}/openapi.json")
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call(base_url=guarded.url, headers=guarded.header())
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        ask()
        tried.append(operation.path)
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/classify",
        "/v1/score",
        "/v1/feedback",
    } <= set(tried)


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """A page of a headless Chromium that is installed on this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no Chromium is installed on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def test_the_page_asks_streams_and_rates(guarded: Guarded, browser_page: Any) -> None:
    page, asked, told = browser_page, list[str](), list[str]()

    def until(true: str) -> None:  # the page's policy forbids the driver's own way to wait, an eval
        wait_for(lambda: page.evaluate(true))

    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(guarded.url)
    until("document.getElementById('state').textContent.includes('wants a key')")
    assert told.pop().count("401")  # the console's own line for it
    assert not told
    page.fill("#key", guarded.secrets["alice"])
    page.press("#key", "Tab")
    page.wait_for_selector("#model option", state="attached")
    models = page.locator("#model option").all_text_contents()
    assert models == ["namer (classification)", "writer (completion)"]
    page.select_option("#model", "writer")
    until("document.querySelectorAll('#replicas tr').length == 2")
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(it => !it.labels.length && !it.ariaLabel).length"
    assert page.evaluate(unnamed) == 0

    page.evaluate(
        "window.changes = 0; new MutationObserver(() => window.changes++).observe(document.getElementById('answers'), {childList: true, subtree: true, characterData: true})"
    )
    page.fill("#tokens", "40")
    page.fill("#text", "x = 1")
    page.click("#send")
    until("/first token \\d+ ms.*\\d+ tokens in/.test(document.querySelector('.times')?.textContent)")
    said = page.text_content("article .said")
    assert said
    assert page.evaluate("window.changes") > 3  # it came in parts
    page.click("article .up")
    page.wait_for_selector('article .up[aria-pressed="true"]')
    request = page.get_attribute("article", "data-request").removeprefix("chatcmpl-")
    assert (request, 1) in {
        (it["request"], it["rating"])
        for it in read_records(guarded.config.run_dir / "feedback", "feedback").to_pylist()
    }

    page.check('input[value="completion"]')
    page.fill("#text", "import os")
    page.click("#send")
    until("document.querySelectorAll('article').length == 2 && document.querySelector('.times').textContent")
    page.select_option("#model", "namer")
    assert page.is_checked('input[value="classification"]')
    page.fill("#text", "def f(self):\n    return self.x")
    page.click("#send")
    until("document.querySelectorAll('article').length == 3 && document.querySelector('.times').textContent")
    right = guarded.post("/v1/classify", model="namer", input="def f(self):\n    return self.x").json()["data"][0]
    assert page.text_content("article .said") == right["label"]
    assert page.locator("article:first-child .scores tr").count() == min(len(right["scores"]), 5)
    page.fill("#key", "sk-manta-wrong")
    page.click("#send")
    page.wait_for_selector("article:first-child .said.error")
    assert "not known here" in page.text_content("article .said")
    assert all(url.startswith((guarded.url, "data:")) for url in asked)
    assert all("401" in line for line in told)

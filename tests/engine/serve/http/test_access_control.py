"""An endpoint with API keys: authentication, rate limits, logs, metrics, feedback, malformed requests, and the page."""

from __future__ import annotations

import asyncio
import json
import re
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
from tests.browser import screenshot
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import metrics_at_rest, processes, wait_for
from tests.engine.serve.llm.test_structured_output import SCHEMA, json_schema_format
from tests.ports import free_port

ROOT = Path(__file__).parents[4]
ORIGIN = "https://friend.example"
SECRET = "sk-Abcdefghijklmnop1234"  # a pattern that masking knows


@dataclass(frozen=True)
class GuardedEndpoint:
    """An endpoint and the secrets of its keys."""

    server: Endpoint
    config: Config
    secrets: dict[str, str]

    @property
    def url(self) -> str:
        return self.server.url

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
        """Sum a metric over all label sets that contain these texts."""
        samples = self.metrics().items()
        return sum(
            value for key, value in samples if key.partition("{")[0] == name and all(label in key for label in labels)
        )

    def log(self) -> list[dict[str, Any]]:
        lines = (self.config.run_dir / "logs" / "access.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def endpoint(
    ray: None, tiny: Config, tiny_functions: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuardedEndpoint]:
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
    yield GuardedEndpoint(up, config, secrets)
    up.stop()


def test_requests_need_a_valid_key(endpoint: GuardedEndpoint) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json", "/page/page.js"):
        assert httpx.get(endpoint.url + path).status_code == 200, path
    codes = {
        "": "missing_api_key",
        "Basic YTpi": "missing_api_key",
        "Bearer": "missing_api_key",
        "Bearer sk-manta-wrong": "invalid_api_key",
        f"Bearer {endpoint.secrets['dave']}": "invalid_api_key",
    }
    for header, code in codes.items():
        for path in ("/v1/models", "/v1/nothing", "/nothing"):
            response = httpx.get(endpoint.url + path, headers={"Authorization": header})
            assert (response.status_code, response.json()["error"]["code"]) == (401, code)
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "'dave' is expired" in httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.header("dave")).text
    assert httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.header()).status_code == 200
    assert httpx.post(f"{endpoint.url}/v1/completions", content=b"{").status_code == 401
    with pytest.raises(openai.AuthenticationError, match="unknown here"):
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="sk-manta-other", max_retries=0).models.list()


def test_a_revoked_key_is_refused(endpoint: GuardedEndpoint) -> None:
    status = lambda: httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.header("erin")).status_code  # noqa: E731
    assert status() == 200
    revoke_key(endpoint.config.keys_file, "erin")
    wait_for(lambda: status() == 401)


def test_requests_of_a_key_are_limited(endpoint: GuardedEndpoint) -> None:
    endpoint.post("/v1/classify", "alice", model="namer", input="x")  # warm-up
    started_at = time.monotonic()
    responses = [endpoint.post("/v1/classify", "bob", model="namer", input="x") for _ in range(4)]
    elapsed_s = time.monotonic() - started_at
    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert 20 - elapsed_s <= int(responses[-1].headers["Retry-After"]) <= 20  # one every 20 s
    error = responses[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "over this key's 3 requests a minute" in error["message"]
    with pytest.raises(openai.RateLimitError):
        endpoint.openai("bob").completions.create(model="writer", prompt="x")
    assert len(endpoint.openai("bob").models.list().data) == 2
    assert endpoint.post("/v1/classify", "alice", model="namer", input="x").status_code == 200


def test_tokens_of_a_key_are_limited(endpoint: GuardedEndpoint) -> None:
    def ask() -> httpx.Response:
        body = {"model": "writer", "prompt": [7, 8], "max_tokens": 100, "logit_bias": {"0": -100}}
        return endpoint.post("/v1/completions", "carol", **body)

    started_at = time.monotonic()
    first, refused = ask(), ask()
    elapsed_s = time.monotonic() - started_at
    assert (first.status_code, refused.status_code) == (200, 429)
    assert first.json()["usage"]["total_tokens"] == 102
    assert "120 tokens a minute" in refused.json()["error"]["message"]
    assert 42 - elapsed_s <= int(refused.headers["Retry-After"]) <= 42  # 18 are left, and two are refilled every second


def test_cross_origin_requests_need_a_configured_origin(endpoint: GuardedEndpoint) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    response = httpx.options(f"{endpoint.url}/v1/completions", headers={"Origin": ORIGIN} | preflight)
    assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    other = httpx.options(f"{endpoint.url}/v1/completions", headers={"Origin": "https://foe.example"} | preflight)
    assert (other.status_code, other.headers.get("Access-Control-Allow-Origin")) == (400, None)
    response = httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.header() | {"Origin": ORIGIN})
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "x-request-id" in response.headers["Access-Control-Expose-Headers"].lower()


def test_a_request_is_logged_by_its_id(endpoint: GuardedEndpoint) -> None:
    prompt = f"mail bob@example.com the key {SECRET}"
    response = endpoint.post(
        "/v1/completions", headers={"X-Request-Id": "my-1"}, model="writer", prompt=prompt, max_tokens=5
    )
    assert response.headers["X-Request-Id"] == "my-1"
    assert response.json()["id"] == "cmpl-my-1"
    own = endpoint.post("/v1/classify", model="namer", input="x")
    assert own.json()["id"] == own.headers["X-Request-Id"]
    wait_for(lambda: any(line["request"] == own.headers["X-Request-Id"] for line in endpoint.log()))
    (line,) = [line for line in endpoint.log() if line["request"] == "my-1"]
    usage = response.json()["usage"]
    assert (line["status"], line["key"], line["model"], line["path"]) == (200, "alice", "writer", "/v1/completions")
    assert (line["read"], line["written"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert line["prompts"] == ["mail <email> the key <secret>"]
    assert 0 < line["milliseconds"] < 60_000


def test_no_secret_is_stored_or_logged(endpoint: GuardedEndpoint) -> None:
    endpoint.post("/v1/completions", model="writer", prompt="x", max_tokens=0)
    texts = [path.read_text(errors="replace") for path in endpoint.config.run_dir.rglob("*") if path.is_file()]
    texts += [path.read_text(errors="replace") for path in ray_logs() if path.is_file()]
    texts.append(httpx.get(f"{endpoint.url}/metrics").text)
    assert len(texts) > 5
    assert not [name for name, secret in endpoint.secrets.items() if any(secret in text for text in texts)]


def ray_logs() -> Iterator[Path]:
    import ray

    context: Any = ray._private.worker.global_worker.node
    return Path(context.get_session_dir_path(), "logs").rglob("*")


def test_metrics_of_requests_and_replicas(endpoint: GuardedEndpoint) -> None:
    names = ('model="writer"', 'key="alice"')
    metrics_at_rest(endpoint.url)
    before = endpoint.metrics()
    body = {"model": "writer", "prompt": [7, 8, 9], "max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100}}
    usages = [endpoint.post("/v1/completions", **body).json()["usage"] for _ in range(2)]
    with httpx.stream("POST", f"{endpoint.url}/v1/completions", json=body | {"stream": True}, headers=endpoint.header()) as stream:  # fmt: skip
        stream.read()
    wait_for(lambda: endpoint.metrics() != before)

    def increase(name: str, *labels: str) -> float:
        old = sum(value for key, value in before.items() if key.partition("{")[0] == name and all(label in key for label in labels))  # fmt: skip
        return endpoint.sum(name, *labels) - old

    wait_for(lambda: increase("manta_requests_total", *names, 'path="/v1/completions"', 'status="200"') == 3)
    generated = sum(usage["completion_tokens"] for usage in usages) * 3 / 2
    assert increase("manta_tokens_total", *names, 'kind="completion"') == generated
    assert increase("manta_tokens_total", *names, 'kind="prompt"') == 9
    assert increase("manta_tokens_total", *names, 'kind="cached"') >= 4
    for name in ("manta_first_token_seconds", "manta_between_tokens_seconds", "manta_queue_seconds"):
        assert increase(f"{name}_count", *names) == 3
    first_token, total = (
        increase("manta_first_token_seconds_sum", *names),
        increase("manta_request_seconds_sum", *names),
    )
    assert 0 < first_token < total
    assert increase("manta_between_tokens_seconds_sum", *names) * (generated / 3 - 1) < total
    assert increase("manta_requests_total", 'status="401"') == 0
    httpx.get(f"{endpoint.url}/v1/models")
    assert increase("manta_requests_total", 'status="401"') == 1
    # Replicas are polled repeatedly: a busy one may not response in time.
    wait_for(lambda: endpoint.sum("manta_replicas", 'model="namer"') == 1)
    wait_for(lambda: increase("manta_replica_forwards_total", 'model="writer"') >= 20)
    wait_for(lambda: endpoint.sum("manta_replica_cache_tokens") > 0)
    wait_for(lambda: endpoint.sum("manta_replica_running") == 0)
    models = httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.header()).json()["data"]

    def versions() -> set[tuple[str, str]]:
        replicas = httpx.get(f"{endpoint.url}/v1/replicas", headers=endpoint.header()).json()["data"]
        return {(replica["model"], replica["version"]) for replica in replicas}

    wait_for(lambda: versions() == {(model["id"], model["hash"][:12]) for model in models})


def test_the_dashboard_queries_existing_metrics(endpoint: GuardedEndpoint) -> None:
    endpoint.post("/v1/completions", model="writer", prompt="x", max_tokens=2)
    families = set(re.findall(r"^# TYPE (\w+)", httpx.get(f"{endpoint.url}/metrics").text, re.MULTILINE))
    series = families | {f"{name}{end}" for name in families for end in ("_bucket", "_count", "_sum", "_total")}
    dashboard = json.loads((ROOT / "engine/serve/dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    queried = {name for query in queries for name in re.findall(r"manta_\w+", query)}
    assert len(queried) > 12
    assert queried <= series
    labels = {label for key in endpoint.metrics() for label in re.findall(r'(\w+)="', key)}
    grouping_labels = {
        label.strip()
        for query in queries
        for group in re.findall(r"by \(([^)]*)\)", query)
        for label in group.split(",")
    }
    assert grouping_labels <= labels | {"rating", "kind"}


def test_options_of_openais_client(endpoint: GuardedEndpoint) -> None:
    api = endpoint.openai()
    ids = Bundle.open(Path(endpoint.config.runs_dir) / "writer" / "bundle").processor()("x = 1")["input_ids"]

    def complete(**options: Any) -> Any:
        defaults = {"model": "writer", "prompt": "x = 1", "max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100}}
        return api.completions.create(**(defaults | options))

    def text(**options: Any) -> str:
        return str(complete(**options).choices[0].text)

    whole = text()
    word = whole[4:6]
    assert text(stop=[word, "never output"]) == whole[: whole.index(word)]
    assert text(echo=True) == "x = 1" + whole
    assert text(prompt=ids) == whole
    assert [choice.text for choice in complete(prompt=[ids, ids]).choices] == [whole, whole]
    assert [choice.text for choice in complete(prompt=["x = 1", "y"], n=2).choices][:2] == [whole, whole]
    assert text(temperature=2, extra_body={"top_k": 1}) == text(temperature=2, top_p=1e-9) == whole
    sampled = {"temperature": 1.5, "seed": 3}
    assert text(**sampled) == text(**sampled) != text(**sampled | {"seed": 4})
    favored = complete(logit_bias={"0": -100, "77": 100}, max_tokens=8, logprobs=2)
    assert favored.choices[0].logprobs.tokens == favored.choices[0].logprobs.tokens[:1] * 8
    assert [len(top) in (2, 3) for top in favored.choices[0].logprobs.top_logprobs] == [True] * 8
    penalized = complete(
        logit_bias={"0": -100, "77": 100}, max_tokens=120, frequency_penalty=2, presence_penalty=2, logprobs=0
    )
    assert (
        len(set(penalized.choices[0].logprobs.tokens)) > 1
    )  # after fifty repeats the penalty outweighs the bias of 100
    last = list(complete(stream=True, stream_options={"include_usage": True}))[-1]
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 20, len(ids))
    chat: Callable[..., Any] = api.chat.completions.create
    output = chat(model="writer", messages=[{"role": "user", "content": "x"}], max_completion_tokens=7)
    assert output.usage.completion_tokens <= 7
    with pytest.raises(openai.BadRequestError) as caught:
        complete(temperature=3)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")


def test_structured_output_follows_its_schema(endpoint: GuardedEndpoint) -> None:
    api = endpoint.openai()
    messages: Any = [{"role": "user", "content": "a cat, please"}]
    response_format: Any = json_schema_format(SCHEMA)
    create: Callable[..., Any] = api.chat.completions.create
    whole = create(model="writer", messages=messages, max_tokens=100, temperature=1.0, seed=5, n=2, response_format=response_format)  # fmt: skip
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    parts = create(model="writer", messages=messages, max_tokens=100, temperature=1.0, seed=5, stream=True, response_format=response_format)  # fmt: skip
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    assert streamed == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="cannot be followed") as caught:
        create(model="writer", messages=messages, response_format=json_schema_format({"type": "objekt"}))
    assert caught.value.param == "response_format"
    text = create(model="writer", messages=messages, max_tokens=3, temperature=0, response_format={"type": "text"})
    assert text.choices[0].message.content


def test_a_task_without_a_model_is_named(endpoint: GuardedEndpoint) -> None:
    api = endpoint.openai()
    with pytest.raises(openai.NotFoundError, match="no model here makes images; there are namer"):
        api.images.generate(model="writer", prompt="a cat")
    with pytest.raises(openai.NotFoundError, match="no model here transcribes speech"):
        api.audio.transcriptions.create(model="writer", file=("a.wav", b"RIFF"))


def test_feedback_and_storable_requests_are_stored(endpoint: GuardedEndpoint) -> None:
    folder = endpoint.config.run_dir / "feedback"
    stored = endpoint.post("/v1/classify", model="namer", input=["def f(): pass"], store=True).json()
    assert endpoint.post("/v1/classify", model="namer", input="not to be stored").status_code == 200
    stream = endpoint.openai().chat.completions.create(
        model="writer", messages=[{"role": "user", "content": "Hi"}], max_tokens=9, stream=True, store=True
    )
    parts = list(stream)
    output = "".join(part.choices[0].delta.content or "" for part in parts)
    records = read_records(folder, "requests").to_pylist()
    assert [record["path"] for record in records] == ["/v1/classify", "/v1/chat/completions"]
    assert records[0]["request"] == stored["id"]
    assert json.loads(records[0]["output"])[0]["label"] == stored["data"][0]["label"]
    assert json.loads(records[1]["output"])[0]["text"] == output
    assert json.loads(records[1]["input"])["messages"][0]["content"] == "Hi"
    assert records[1]["version"]
    response = endpoint.post("/v1/feedback", request=stored["id"], rating="down", label="json")
    assert response.json() == {"object": "feedback", "request": stored["id"], "model": "namer", "stored": True}
    endpoint.post("/v1/feedback", request=parts[0].id, rating="up")
    endpoint.post("/v1/feedback", request="from-before-a-restart", text="better")
    feedback = read_records(folder, "feedback").to_pylist()
    assert [(record["model"], record["rating"], record["label"], record["text"]) for record in feedback] == [
        ("namer", -1, "json", None), ("writer", 1, None, None), ("", None, None, "better"),
    ]  # fmt: skip
    assert f"chatcmpl-{feedback[1]['request']}" == parts[0].id
    assert endpoint.sum("manta_feedback_total", 'model="namer"', 'rating="down"') == 1
    assert endpoint.post("/v1/feedback", "carol", request=stored["id"], rating="up").status_code == 404
    for body in ({}, {"request": stored["id"]}, {"request": "a b", "rating": "up"}, {"request": "x", "rating": "good"}):
        assert endpoint.post("/v1/feedback", **body).status_code == 400


def test_aborted_requests_free_their_slots(endpoint: GuardedEndpoint) -> None:
    body = {"model": "writer", "prompt": "x", "max_tokens": 120, "n": 16, "logit_bias": {"0": -100}}

    async def hang_up(stream: bool) -> None:
        async with httpx.AsyncClient(headers=endpoint.header()) as client:
            request = asyncio.create_task(client.post(f"{endpoint.url}/v1/completions", json=body | {"stream": stream}))
            await asyncio.sleep(0.15)
            request.cancel()

    for stream in (True, False):
        asyncio.run(hang_up(stream))
    response = endpoint.post("/v1/completions", model="writer", prompt="y", max_tokens=2)
    assert response.status_code == 200
    wait_for(lambda: endpoint.sum("manta_replica_running") + endpoint.sum("manta_replica_waiting") == 0)
    metrics_at_rest(endpoint.url)


def memory_of(name: str) -> int:
    """Return the resident bytes of the Serve processes with a name."""
    return sum(process.memory_info().rss for process in processes(name))


def test_idle_and_slow_clients_do_not_block_others(endpoint: GuardedEndpoint) -> None:
    host, port = "127.0.0.1", endpoint.config.serve.port
    start = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.secrets['alice']}\r\nContent-Type: application/json\r\n"
    before = memory_of("ServeReplica:manta:api")
    assert before
    idle = []
    try:
        for i in range(1000):
            connection = socket.create_connection((host, port), timeout=30)
            idle.append(connection)
            if i % 2:
                connection.sendall(f"{start}Content-Length: 1000\r\n\r\n{{".encode())  # and never the rest
        response = endpoint.post("/v1/completions", model="writer", prompt="x", max_tokens=3)
        assert response.status_code == 200
        reply = idle[-1].recv(1000)
        assert b" 408 " in reply.partition(b"\r\n")[0]
        growth = memory_of("ServeReplica:manta:api") - before
        assert growth < 200 * 2**20
    finally:
        for connection in idle:
            connection.close()
    body = json.dumps(
        {"model": "writer", "prompt": "x", "max_tokens": 120, "n": 16, "stream": True, "temperature": 1.5}
    )
    reader = socket.create_connection((host, port))
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.sendall(f"{start}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    wait_for(lambda: endpoint.sum("manta_replica_running") == 0)  # its slots do not wait for the reader
    assert endpoint.post("/v1/completions", model="writer", prompt="x", max_tokens=3).status_code == 200
    reader.close()


def test_huge_and_malformed_bodies_get_a_4xx(endpoint: GuardedEndpoint) -> None:
    huge = json.dumps({"model": "writer", "prompt": "x" * 10_000_000}).encode()

    def post(body: bytes) -> httpx.Response:
        headers = endpoint.header() | {"Content-Type": "application/json"}
        return httpx.post(f"{endpoint.url}/v1/completions", content=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(post, [huge] * 16))
        assert {response.status_code for response in responses} == {413}

        def chunks() -> Iterator[bytes]:
            yield from (huge[i : i + 65536] for i in range(0, len(huge), 65536))

        with httpx.Client() as client:
            assert (
                client.post(f"{endpoint.url}/v1/completions", content=chunks(), headers=endpoint.header()).status_code
                == 413
            )
        malformed = [
            b"", b"null", b"[]", b"3", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"model": "\\ud800", "prompt": "x"}',
            b'{"prompt": "x", "model": "writer", "user": "\\udfff"}', b'{"prompt": "x", "stop": ["\\ud800"]}', b"[" * 20_000,
            b'{"prompt": ' + b"[" * 20_000, b'{"prompt": "x", "seed": ' + b"9" * 20_000 + b"}", b'{"prompt": "x", "temperature": NaN}',
            b'{"prompt": "x", "top_p": Infinity}', b'{"prompt": [1e400]}', b'{"prompt": [-1]}', b'{"prompt": [99999999999999999999]}',
            b'{"prompt": [true]}', b'{"prompt": "x", "n": 1.5}', b'{"prompt": "x", "max_tokens": null}', b'{"prompt": "x", "logit_bias": {"-1": 1}}',
            b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"model": "writer", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ' + b'{"not":' * 800 + b"{}" + b"}" * 800 + b"}}}",
            b'{"prompt": "x", "logit_bias": {"\xc2\xb2": 1}}', b'{"prompt": "x", "model": "a\\u0000b"}',
            b'{"prompt": "x", "model": "writer", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}}',
        ]  # fmt: skip
        for body, response in zip(malformed, pool.map(post, malformed), strict=True):
            assert 400 <= response.status_code < 500, (body[:80], response.status_code, response.text)
            assert response.json()["error"]["message"]
    assert endpoint.post("/v1/completions", model="writer", prompt="x\x00y", max_tokens=3).status_code == 200


def test_pages_work_offline(endpoint: GuardedEndpoint) -> None:
    for page in ("/docs", "/"):
        text = httpx.get(endpoint.url + page).text
        links = re.findall(r'(?:src|href)="([^"#]+)"', text)
        assert links
        for link in links:
            assert not link.startswith(("http:", "https:", "//")), link
            if not link.startswith("data:"):
                assert httpx.get(f"{endpoint.url}/{link.lstrip('/')}").status_code == 200, link
    assert httpx.get(f"{endpoint.url}/page/..%2Fapi.py").status_code == 404


def test_no_valid_request_of_the_schema_gets_a_5xx(endpoint: GuardedEndpoint) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    tested_paths = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            response = case.call(base_url=endpoint.url, headers=endpoint.header())
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        call()
        tested_paths.append(operation.path)
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/classify",
        "/v1/score",
        "/v1/feedback",
    } <= set(tested_paths)


def test_the_page_streams_and_rates_responses(endpoint: GuardedEndpoint, browser_page: Any, tmp_path: Path) -> None:
    page, urls, errors = browser_page, list[str](), list[str]()

    def wait_until(condition: str) -> None:  # the page's content policy forbids the driver's own wait, which uses eval
        wait_for(lambda: page.evaluate(condition))

    page.on("request", lambda request: urls.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(endpoint.url)
    wait_until("document.getElementById('state').textContent.includes('requires an API key')")
    assert errors.pop().count("401")  # the console's line for the refused request
    assert not errors
    page.fill("#key", endpoint.secrets["alice"])
    page.press("#key", "Tab")
    page.wait_for_selector("#model option", state="attached")
    models = page.locator("#model option").all_text_contents()
    assert models == ["namer (classification)", "writer (completion)"]
    page.select_option("#model", "writer")
    wait_until("document.querySelectorAll('#replicas tr').length == 2")
    unlabeled = "[...document.querySelectorAll('input, select, textarea')].filter(it => !it.labels.length && !it.ariaLabel).length"
    assert page.evaluate(unlabeled) == 0

    page.evaluate(
        "window.changes = 0; new MutationObserver(() => window.changes++).observe(document.getElementById('responses'), {childList: true, subtree: true, characterData: true})"
    )
    page.fill("#tokens", "40")
    page.fill("#text", "x = 1")
    page.click("#send")
    wait_until("/first token \\d+ ms.*\\d+ tokens in/.test(document.querySelector('.timing')?.textContent)")
    output = page.text_content("article .output")
    assert output
    assert page.evaluate("window.changes") > 3  # it was streamed
    page.click("article .up")
    page.wait_for_selector('article .up[aria-pressed="true"]')
    request = page.get_attribute("article", "data-request").removeprefix("chatcmpl-")
    assert (request, 1) in {
        (record["request"], record["rating"])
        for record in read_records(endpoint.config.run_dir / "feedback", "feedback").to_pylist()
    }

    page.check('input[value="completion"]')
    page.fill("#text", "import os")
    page.click("#send")
    wait_until("document.querySelectorAll('article').length == 2 && document.querySelector('.timing').textContent")
    page.select_option("#model", "namer")
    assert page.is_checked('input[value="classification"]')
    page.fill("#text", "def f(self):\n    return self.x")
    page.click("#send")
    wait_until("document.querySelectorAll('article').length == 3 && document.querySelector('.timing').textContent")
    expected = endpoint.post("/v1/classify", model="namer", input="def f(self):\n    return self.x").json()["data"][0]
    assert page.text_content("article .output") == expected["label"]
    assert page.locator("article:first-child .scores tr").count() == min(len(expected["scores"]), 5)
    screenshot(page, "page", tmp_path)
    page.fill("#key", "sk-manta-wrong")
    page.click("#send")
    page.wait_for_selector("article:first-child .output.error")
    assert "unknown here" in page.text_content("article .output")
    assert all(url.startswith((endpoint.url, "data:")) for url in urls)
    assert all("401" in line for line in errors)

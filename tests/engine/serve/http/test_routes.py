"""The routes of an ingress without Ray: a router of canned results stands for the replicas."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.serve.exceptions import BackPressureError

from engine.config import ServeConfig
from engine.serve.http.api import build_app, route_paths
from engine.serve.http.feedback_store import read_records
from engine.serve.http.middleware import AccessOptions
from engine.serve.http.request_handler import RequestHandler
from engine.serve.jobs import (
    Choice,
    Classification,
    ClassificationJob,
    ClassificationResult,
    EmbeddingJob,
    EmbeddingResult,
    Failure,
    GenerationJob,
    GenerationResult,
    ImageJob,
    ImageResult,
    ImageSize,
    ModelInfo,
    PromptInfo,
    StreamChunk,
    StreamMessage,
    Timings,
    TranscriptionJob,
    TranscriptionResult,
)

INFOS = {
    "writer": ModelInfo("completion", "a" * 64, 128, 512, True, adapters={"poet": "b" * 64}),
    "namer": ModelInfo("classification", "c" * 64, 128, 512, True),
    "painter": ModelInfo("images", "d" * 64, 1, 0, False, image=ImageSize(16, 64)),
    "listener": ModelInfo("transcription", "e" * 64, 30, 512, False, audio_positions=50),
}
PROMPT = PromptInfo(prompt_tokens=3, cached_tokens=1, echoed_texts=[])
TIMINGS = Timings(0.1, 0.2, 0.05)


class CannedStream:
    """The messages of a stream."""

    def __init__(self, messages: list[StreamMessage | Exception]) -> None:
        self.messages, self.is_cancelled = messages, False

    def __aiter__(self) -> AsyncIterator[StreamMessage]:
        return self

    async def __anext__(self) -> StreamMessage:
        if not self.messages:
            raise StopAsyncIteration
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        self.is_cancelled = True


class CannedRouter:
    """Returns given results, and keeps the jobs that it gets."""

    revision = 3

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.calls: list[tuple[str, str, Any]] = []
        self.keys: list[str] = []
        self.ratings: list[tuple[str, str, bool]] = []

    def __iter__(self) -> Iterator[str]:
        return iter(INFOS)

    def begin_request(self, key: str, trace: Any = None) -> None:
        self.keys.append(key)

    def version(self, name: str) -> Any:
        return SimpleNamespace(id=f"version of {name}")

    def model_info(self, name: str) -> ModelInfo:
        return INFOS[name]

    async def fetch_model_info(self, name: str) -> None:
        pass

    def status(self, name: str) -> dict[str, Any]:
        return {"version": f"version of {name}", "trial": None, "events": []}

    def record_rating(self, name: str, version_hash: str, is_bad: bool) -> None:
        self.ratings.append((name, version_hash, is_bad))

    async def broadcast(self, name: str, method: str, timeout_s: float) -> list[Any]:
        assert method == "load_stats"
        return [{"replica": f"replica of {name}", "version": "v", "device": "cpu", "running": 1}, TimeoutError()]

    async def call(self, name: str, method: str, job: Any) -> Any:
        self.calls.append((name, method, job))
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def stream(self, name: str, job: GenerationJob) -> Any:
        self.calls.append((name, "stream", job))
        return self.results.pop(0)


class Ingress:
    """The application of an ingress, without a server."""

    def __init__(self, folder: Path) -> None:
        self.router: Any = CannedRouter()
        options = asdict(ServeConfig(max_new_tokens=100, max_queue=4))
        access = asdict(AccessOptions(records_dir=str(folder), log_file=str(folder / "access.jsonl")))
        self.handler = RequestHandler(self.router, {"options": options, "access": access}, route_paths(), None)
        self.app = build_app(self.handler)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def post(self, path: str, body: dict[str, Any], *results: Any) -> httpx.Response:
        """Send a request that the router answers with these results."""
        self.router.results = list(results)
        return self.request("POST", path, json=body)


@pytest.fixture
def ingress(tmp_path: Path) -> Ingress:
    return Ingress(tmp_path)


def test_completions_are_formatted_counted_and_stored(ingress: Ingress, tmp_path: Path) -> None:
    choices = [Choice(0, "one", 2, "stop", timings=TIMINGS), Choice(1, "two", 3, "length", timings=TIMINGS)]
    body = {"model": "writer:poet", "prompt": "x", "n": 2, "user": "alice", "seed": 7, "temperature": 0.5, "stop": "end", "store": True}  # fmt: skip
    response = ingress.post("/v1/completions", body, GenerationResult(PROMPT, choices))
    assert response.status_code == 200
    content = response.json()
    assert [(choice["text"], choice["finish_reason"]) for choice in content["choices"]] == [("one", "stop"), ("two", "length")]  # fmt: skip
    assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 1}}  # fmt: skip
    assert (content["model"], response.headers["x-manta-version"]) == ("writer:poet", "version of writer")
    ((name, method, job),) = ingress.router.calls
    assert (name, method, job.prompts, job.n, job.seed, job.stop) == ("writer", "complete", ["x"], 2, 7, ["end"])
    assert (job.adapter, job.client, job.sampling.temperature, job.is_deterministic) == ("poet", "alice", 0.5, True)
    assert ingress.router.keys == ["alice"]
    (record,) = read_records(tmp_path, "requests").to_pylist()
    assert json.loads(record["output"]) == [{"text": "one", "reason": "stop"}, {"text": "two", "reason": "length"}]
    assert (record["version"], record["path"]) == (f"{'a' * 12}:poet", "/v1/completions")
    (line,) = map(json.loads, (tmp_path / "access.jsonl").read_text().splitlines())
    assert (line["read"], line["written"], line["status"]) == (3, 5, 200)
    metrics = ingress.request("GET", "/metrics").text
    assert 'manta_queue_seconds_count{key="",model="writer",version="aaaaaaaaaaaa:poet"} 2.0' in metrics
    assert 'manta_replicas{model="namer",version="v"} 1.0' in metrics


def test_a_chat_is_one_job_with_its_messages(ingress: Ingress) -> None:
    body = {"model": "writer", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "logprobs": True, "top_logprobs": 2}  # fmt: skip
    response = ingress.post("/v1/chat/completions", body, GenerationResult(PROMPT, [Choice(0, "Ho", 1, "stop")]))
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": "Ho", "refusal": None}
    job = ingress.router.calls[0][2]
    assert (job.messages, job.is_chat, job.max_tokens, job.logprobs) == ([{"role": "user", "content": "Hi"}], True, None, 2)  # fmt: skip


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_ends_with_usage(ingress: Ingress) -> None:
    chunks = [StreamChunk([Choice(0, "o", 1)]), StreamChunk([Choice(0, "ne", 2, "stop", timings=TIMINGS)])]
    body = {"model": "writer", "prompt": "x", "echo": True, "stream": True, "stream_options": {"include_usage": True}}
    stream = CannedStream([PromptInfo(3, 0, ["x"]), *chunks])
    first, second, last = events(ingress.post("/v1/completions", body, stream))
    assert [event["choices"][0]["text"] for event in (first, second)] == ["xo", "ne"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
    assert not stream.is_cancelled
    assert 'manta_first_token_seconds_count{key="",model="writer"' in ingress.request("GET", "/metrics").text


@pytest.mark.parametrize(("end", "message"), [(Failure("out of slots", status=503), "out of slots"), (BackPressureError(1, 1), "the replica was lost")])  # fmt: skip
def test_a_failed_stream_ends_with_an_error_event(ingress: Ingress, end: Any, message: str) -> None:
    stream = CannedStream([PROMPT, StreamChunk([Choice(0, "o", 1)]), end])
    *_, error = events(ingress.post("/v1/completions", {"model": "writer", "prompt": "x", "stream": True}, stream))
    assert message in error["error"]["message"]
    assert 'status="500"' in ingress.request("GET", "/metrics").text


def test_an_abandoned_stream_is_cancelled(ingress: Ingress) -> None:
    stream = CannedStream([PROMPT, StreamChunk([Choice(0, "o", 1)]), asyncio.CancelledError()])  # type: ignore[list-item]
    with contextlib.suppress(asyncio.CancelledError):
        ingress.post("/v1/completions", {"model": "writer", "prompt": "x", "stream": True}, stream)
    assert stream.is_cancelled


TASKS: list[tuple[str, dict[str, Any], Any, type, Callable[[Any], Any], Any]] = [
    (
        "/v1/classify", {"input": ["x", "y"]}, ClassificationResult([Classification("a", {"a": 0.9, "b": 0.1}, 2)] * 2), ClassificationJob,
        lambda content: [(row["index"], row["label"]) for row in content["data"]], [(0, "a"), (1, "a")],
    ),
    (
        "/v1/embeddings", {"model": "namer", "input": ["x"]}, EmbeddingResult([[0.6, 0.8]], 2), EmbeddingJob,
        lambda content: (content["data"][0]["embedding"], content["usage"]["prompt_tokens"]), ([0.6, 0.8], 2),
    ),
    (
        "/v1/embeddings", {"model": "namer", "input": ["x"], "encoding_format": "base64"}, EmbeddingResult([[0.5, 1.0]], 2), EmbeddingJob,
        lambda content: content["data"][0]["embedding"], "AAAAPwAAgD8=",
    ),
    (
        "/v1/score", {"model": "namer", "text_1": "x", "text_2": ["x", "y"]}, EmbeddingResult([[1.0, 0.0], [0.0, 1.0]], 4), EmbeddingJob,
        lambda content: [row["score"] for row in content["data"]], [1.0, 0.0],
    ),
    (
        "/v1/images/generations", {"prompt": "cat", "n": 2, "seed": 5}, ImageResult(["UE5H", "UE5I"]), ImageJob,
        lambda content: ([image["b64_json"] for image in content["data"]], content["size"], content["usage"]["output_tokens"]), (["UE5H", "UE5I"], "16x16", 128),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "result", "job", "part", "expected"), TASKS)
def test_other_tasks(
    ingress: Ingress, path: str, body: Any, result: Any, job: type, part: Callable[[Any], Any], expected: Any
) -> None:
    response = ingress.post(path, body, result)
    assert response.status_code == 200, response.text
    assert part(response.json()) == expected
    assert isinstance(ingress.router.calls[0][2], job)


def test_a_transcription_has_the_requested_format(ingress: Ingress) -> None:
    result = TranscriptionResult("one", [1], 0.5, 25, 1, avg_logprob=-0.5)
    bodies = {}
    for response_format in ("json", "text", "verbose_json"):
        ingress.router.results = [result]
        files, data = {"file": ("a.wav", b"RIFF")}, {"response_format": response_format, "language": "en"}
        response = ingress.request("POST", "/v1/audio/transcriptions", files=files, data=data)
        bodies[response_format] = response.text if response_format == "text" else response.json()
    assert bodies["text"] == "one"
    assert bodies["json"]["usage"] == {"type": "tokens", "input_tokens": 25, "output_tokens": 1, "total_tokens": 26}
    (segment,) = bodies["verbose_json"]["segments"]
    assert (segment["end"], segment["avg_logprob"], bodies["verbose_json"]["language"]) == (0.5, -0.5, "en")
    jobs = [job for _, _, job in ingress.router.calls]
    assert jobs == [TranscriptionJob(b"RIFF", 0.0, "en", with_logprob) for with_logprob in (False, False, True)]


@pytest.mark.parametrize(
    ("path", "body", "result", "status", "param"),
    [
        ("/v1/completions", {"model": "other", "prompt": "x"}, None, 404, "model"),
        ("/v1/completions", {"model": "namer", "prompt": "x"}, None, 400, "model"),
        ("/v1/completions", {"model": "writer", "prompt": [512]}, None, 400, "prompt"),
        ("/v1/completions", {"model": "writer", "prompt": "x", "max_tokens": 101}, None, 400, "max_tokens"),
        ("/v1/completions", {"model": "writer", "prompt": ["x"] * 3, "n": 2}, None, 400, "prompt"),
        ("/v1/completions", {"model": "writer", "prompt": "x", "logit_bias": {"512": 1}}, None, 400, "logit_bias"),
        ("/v1/completions", {"model": "writer", "prompt": "x"}, Failure("too long", "max_tokens"), 400, "max_tokens"),
        ("/v1/completions", {"model": "writer", "prompt": "x"}, BackPressureError(1, 1), 429, None),
        ("/v1/completions", {"model": "writer", "prompt": "x"}, ZeroDivisionError(), 500, None),
        ("/v1/embeddings", {"input": "x"}, None, 400, "model"),
        ("/v1/embeddings", {"model": "painter", "input": "x"}, None, 400, "model"),
        ("/v1/embeddings", {"model": "writer:poet", "input": "x"}, None, 400, "model"),
        ("/v1/embeddings", {"model": "namer", "input": ["x"] * 1025}, None, 400, "input"),
        ("/v1/score", {"model": "namer", "text_1": "x", "text_2": "y"}, Failure("too long", "input"), 400, "text_2"),
        ("/v1/images/generations", {"prompt": "x", "size": "32x32"}, None, 400, "size"),
        ("/v1/nothing", {}, None, 404, None),
    ],
)
def test_refused_requests_have_openais_error_body(
    ingress: Ingress, path: str, body: dict[str, Any], result: Any, status: int, param: str | None
) -> None:
    response = ingress.post(path, body, result)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert response.json()["error"]["message"]


def test_feedback_names_the_version_that_answered(ingress: Ingress, tmp_path: Path) -> None:
    result = GenerationResult(PROMPT, [Choice(0, "one", 2, "stop")])
    request_id = ingress.post("/v1/completions", {"model": "writer", "prompt": "x"}, result).json()["id"]
    response = ingress.post("/v1/feedback", {"request": request_id, "rating": "down"})
    assert (response.status_code, response.json()["model"]) == (200, "writer")
    assert ingress.router.ratings == [("writer", "a" * 12, True)]
    assert ingress.post("/v1/feedback", {"request": "from-before-a-restart", "text": "better"}).json()["model"] is None
    records = read_records(tmp_path, "feedback").to_pylist()
    assert [(record["model"], record["rating"], record["text"]) for record in records] == [("writer", -1, None), ("", None, "better")]  # fmt: skip


def test_models_replicas_and_readiness(ingress: Ingress) -> None:
    models = {model["id"]: model for model in ingress.request("GET", "/v1/models").json()["data"]}
    assert set(models) == {"writer", "writer:poet", "namer", "painter", "listener"}
    assert (models["writer:poet"]["hash"], models["writer:poet"]["parent"]) == ("b" * 64, "writer")
    assert models["namer"]["version"] == "version of namer"
    ready = ingress.request("GET", "/readyz")
    assert (ready.status_code, ready.headers["x-manta-table"], ready.json()["status"]) == (200, "3", "ready")
    replicas = ingress.request("GET", "/v1/replicas").json()["data"]
    assert {replica["model"]: replica["replica"] for replica in replicas} == {name: f"replica of {name}" for name in INFOS}  # fmt: skip


def test_metrics_name_all_routes_of_the_schema(ingress: Ingress) -> None:
    assert route_paths() == {"/", "/docs", *ingress.app.openapi()["paths"]}

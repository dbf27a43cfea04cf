"""Traces of requests, as a collector of OpenTelemetry gets them from a real endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'manta-train[tracing]'")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from engine.bundles.bundle import Bundle
from engine.config import Config, ServeConfig, with_values
from engine.errors import UserError
from engine.serve.deploy import Endpoint, deploy
from engine.serve.http.middleware import Access, AccessControl, RequestContext
from engine.serve.http.schemas import CompletionRequest
from engine.serve.metrics import Metrics
from engine.serve.replica import Refused, Replica
from engine.serve.tracing import NO_SPAN, Tracing, handed_on, trace_id
from tests.engine.serve.clients import wait_for
from tests.engine.serve.test_serve import writer_and_namer
from tests.ports import free_port

WORD = "zanzibar"  # of the prompts, and of nothing else
PROMPT = f"import {WORD}\n"
CLIENT = "00f067aa0ba902b7"  # the client's own span


@dataclass
class Told:
    """A span as it was sent."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    began: int  # ns
    ended: int
    about: dict[str, Any]
    process: dict[str, Any]
    events: dict[str, int]
    status: int


def plain(attributes: Any) -> dict[str, Any]:
    return {it.key: getattr(it.value, it.value.WhichOneof("value")) for it in attributes}


@dataclass
class Collector:
    """Takes traces by OTLP over HTTP, as long as it isn't `held`; then it takes none and never answers."""

    spans: list[Told] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    asked: int = 0
    free: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        assert (path, headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        self.bodies.append(body)
        self.headers.append(headers)
        for of_process in ExportTraceServiceRequest.FromString(body).resource_spans:
            process = plain(of_process.resource.attributes)
            for it in (span for scope in of_process.scope_spans for span in scope.spans):
                self.spans.append(
                    Told(
                        it.name, it.trace_id.hex(), it.span_id.hex(), it.parent_span_id.hex(), it.kind, it.start_time_unix_nano,
                        it.end_time_unix_nano, plain(it.attributes), process, {e.name: e.time_unix_nano for e in it.events},
                        it.status.code,
                    )
                )  # fmt: skip

    def trace(self, trace: str, spans: int) -> list[Told]:
        """Wait until so many spans of a trace are here; return them, the eldest first."""
        wait_for(lambda: sum(it.trace == trace for it in self.spans) >= spans)
        return sorted((it for it in self.spans if it.trace == trace), key=lambda it: it.began)


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    collector.free.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.asked += 1
            collector.free.wait()
            collector.take(
                self.path,
                {key.lower(): it for key, it in self.headers.items()},
                self.rfile.read(int(self.headers["Content-Length"])),
            )
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        collector.free.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as it:
        yield it


@pytest.fixture(scope="module")
def bundles(tiny: Config, tiny_functions: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    return writer_and_namer(tiny, tiny_functions, tmp_path_factory.mktemp("traced"))


@pytest.fixture(scope="module")
def config(tiny: Config, collector: Collector) -> Config:
    return with_values(tiny, {"name": "traced", "serve.port": free_port(), "serve.tracing": collector.url})


@pytest.fixture(scope="module")
def endpoint(ray: None, config: Config, bundles: dict[str, Bundle]) -> Iterator[Endpoint]:
    up = deploy(config, {name: bundle.folder for name, bundle in bundles.items()})
    yield up
    up.stop()


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        yield client


def within(number: int, sampled: bool = True) -> tuple[str, dict[str, str]]:
    """Return a client's trace, and the header that tells it."""
    trace = f"{number:032x}"
    return trace, {"traceparent": f"00-{trace}-{CLIENT}-{int(sampled):02x}"}


def test_a_trace_goes_from_the_client_through_the_ingress_to_each_completion(
    client: httpx.Client, config: Config, collector: Collector, bundles: dict[str, Bundle]
) -> None:
    trace, header = within(1)
    body = {"prompt": PROMPT, "max_tokens": 8, "n": 2, "temperature": 0}
    answer = client.post("/v1/completions", json=body, headers=header | {"X-Request-Id": "asked-1"})
    assert answer.status_code == 200
    spent = answer.json()["usage"]
    spans = collector.trace(trace, 8)
    (request,) = [it for it in spans if it.parent == CLIENT]
    (replica,) = [it for it in spans if it.parent == request.id]
    phases = [it for it in spans if it.parent == replica.id]
    assert (request.name, request.kind, request.status) == ("POST /v1/completions", Sent.SPAN_KIND_SERVER, Status.STATUS_CODE_UNSET)  # fmt: skip
    version = bundles["writer"].hash[:12]
    assert request.about == {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "writer", "manta.version": version,
        "gen_ai.usage.input_tokens": spent["prompt_tokens"], "gen_ai.usage.output_tokens": 16, "manta.request": "asked-1",
    }  # fmt: skip
    assert replica.name == "replica complete"
    assert (replica.process["manta.version"], replica.process["service.name"]) == (version, "manta")
    assert replica.process["service.instance.id"]
    for choice in (0, 1):
        queue, prefill, generation = [it for it in phases if it.about["manta.choice"] == choice]
        assert [it.name for it in (queue, prefill, generation)] == ["queue", "prefill", "generation"]
        assert request.began < replica.began < queue.began
        assert queue.ended == prefill.began
        assert prefill.ended == generation.began
        assert generation.ended < replica.ended < request.ended
        assert prefill.about["gen_ai.usage.input_tokens"] == spent["prompt_tokens"]
        assert generation.about["gen_ai.usage.output_tokens"] == 8
    reused = [it.about["manta.cached_tokens"] for it in phases if it.name == "prefill"]
    assert sum(reused) == spent["prompt_tokens_details"]["cached_tokens"]
    assert replica.events == {"first token": min(it.began for it in phases if it.name == "generation")}
    assert len(spans) == len(phases) + 2 == 8
    lines = [json.loads(line) for line in (config.run_dir / "logs" / "access.jsonl").read_text().splitlines()]
    assert [line["trace"] for line in lines if line["request"] == "asked-1"] == [trace]


def test_a_stream_tells_when_its_client_got_the_first_token(client: httpx.Client, collector: Collector) -> None:
    trace, header = within(2)
    body = {"messages": [{"role": "user", "content": WORD}], "max_tokens": 6, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body, headers=header) as answer:
        assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
    request, replica, *phases = collector.trace(trace, 5)
    assert (request.name, replica.name) == ("POST /v1/chat/completions", "replica stream")
    assert (request.about["gen_ai.operation.name"], request.about["gen_ai.usage.output_tokens"]) == ("chat", 6)
    assert [it.name for it in phases] == ["queue", "prefill", "generation"]
    assert request.began < replica.events["first token"] < request.events["first token"] < request.ended


def test_other_tasks_have_traces_too(client: httpx.Client, collector: Collector) -> None:
    for number, path, work in ((3, "/v1/classify", "classify"), (4, "/v1/embeddings", "embed")):
        trace, header = within(number)
        body = {"model": "namer", "input": [f"return {WORD}", "pass"]}
        assert client.post(path, json=body, headers=header).status_code == 200
        request, replica = collector.trace(trace, 2)
        assert (request.name, replica.name, replica.parent) == (f"POST {path}", f"replica {work}", request.id)
        assert request.about["gen_ai.usage.input_tokens"] > 2
        assert request.about.get("gen_ai.operation.name") == {"embed": "embeddings"}.get(work)


def test_a_refusal_is_the_requests_fault(client: httpx.Client, collector: Collector) -> None:
    trace, header = within(5)
    body = {"model": "nobody", "prompt": PROMPT}
    assert client.post("/v1/completions", json=body, headers=header).status_code == 404
    (request,) = collector.trace(trace, 1)
    assert (request.about["http.response.status_code"], request.status) == (404, Status.STATUS_CODE_UNSET)
    assert "gen_ai.request.model" not in request.about
    trace, header = within(6)
    assert client.post("/v1/completions", json={"prompt": PROMPT * 30}, headers=header).status_code == 400
    request, replica = collector.trace(trace, 2)
    assert {request.status, replica.status} == {Status.STATUS_CODE_UNSET}
    trace, header = within(7)
    assert client.post(f"/v1/{WORD}", json={}, headers=header).status_code == 404
    (request,) = collector.trace(trace, 1)
    assert (request.name, "http.route" in request.about) == ("POST", False)


def test_the_client_says_whether_a_trace_is_kept_and_looking_is_none(
    client: httpx.Client, collector: Collector
) -> None:
    left_out, header = within(8, sampled=False)
    body = {"prompt": PROMPT, "max_tokens": 2}
    assert client.post("/v1/completions", json=body, headers=header).status_code == 200
    looked, header = within(9)
    assert client.get("/v1/models", headers=header).status_code == 200
    kept, header = within(10)
    assert client.post("/v1/completions", json=body, headers=header).status_code == 200
    assert len(collector.trace(kept, 5)) == 5
    assert not [it for it in collector.spans if it.trace in (left_out, looked)]
    before = len(collector.spans)
    assert client.post("/v1/completions", json=body, headers={"traceparent": "nonsense"}).status_code == 200
    wait_for(lambda: len(collector.spans) >= before + 5)
    own = collector.spans[before:]
    assert len({it.trace for it in own}) == 1
    assert sorted(it.parent == "" for it in own) == [False, False, False, False, True]


def test_a_collector_that_hangs_changes_nothing_for_clients(client: httpx.Client, collector: Collector) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    wanted = client.post("/v1/completions", json=body).json()["choices"]
    collector.free.clear()
    try:
        asked = collector.asked
        for _ in range(30):
            assert client.post("/v1/completions", json=body).json()["choices"] == wanted
        wait_for(lambda: collector.asked >= asked + 2)  # both processes wait for it by now
        assert client.get("/readyz").status_code == 200
        began = time.perf_counter()
        for _ in range(30):
            assert client.post("/v1/completions", json=body).json()["choices"] == wanted
        assert time.perf_counter() - began < 100  # it would take 10 s each
    finally:
        collector.free.set()
    trace, header = within(11)
    client.post("/v1/completions", json=body, headers=header)
    assert len(collector.trace(trace, 5)) == 5  # it goes on where the collector is back


def test_no_text_is_sent(client: httpx.Client, collector: Collector) -> None:
    trace, header = within(12)
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "user": f"user of {WORD}"}
    text = client.post("/v1/completions", json=body, headers=header).json()["choices"][0]["text"]
    collector.trace(trace, 5)
    sent = b"".join(collector.bodies)
    assert WORD.encode() not in sent
    assert len(text) > 30
    assert not [i for i in range(len(text) - 15) if text[i : i + 15].encode() in sent]


def test_work_that_ends_early_is_told_as_what_it_was(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    job = CompletionRequest(prompt=PROMPT, max_tokens=100, temperature=0, stream=True).job() | {"client": ""}

    async def hang_up(replica: Replica, header: dict[str, str]) -> None:
        stream = replica.stream(job, header)
        assert "head" in await anext(stream)
        await stream.aclose()

    with collecting() as collector:
        replica = Replica(str(bundles["writer"].folder), asdict(ServeConfig(tracing=collector.url)))
        trace, header = within(20)
        asyncio.run(hang_up(replica, header))
        work, *phases = collector.trace(trace, 4)
        assert (work.parent, work.about["manta.cancelled"], work.status) == (CLIENT, True, Status.STATUS_CODE_UNSET)
        assert [it.name for it in phases] == ["queue", "prefill", "generation"]
        for number, error in ((21, RuntimeError(WORD)), (22, Refused(WORD, status=503)), (23, Refused(WORD))):
            with contextlib.suppress(type(error)), replica.tracing.work("complete", within(number)[1]):
                raise error
        lost, late, wrong = (collector.trace(within(number)[0], 1)[0] for number in (21, 22, 23))
        failed = Status.STATUS_CODE_ERROR
        assert (lost.status, lost.about["error.type"]) == (failed, "RuntimeError")
        assert (late.status, late.about["error.type"]) == (failed, "503")
        assert (wrong.status, "error.type" in wrong.about) == (Status.STATUS_CODE_UNSET, False)
        assert WORD.encode() not in b"".join(collector.bodies)


def test_an_answer_that_failed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with collecting() as collector:
        door = AccessControl(Access(tracing=collector.url), Metrics(), {"/v1/completions"})
        trace, header = within(30)
        headers = [(b"traceparent", header["traceparent"].encode()), (b"tracestate", b"vendor=1")]
        visit: RequestContext = door.visit({"method": "POST", "path": "/v1/completions", "headers": headers})
        assert trace_id(visit.span) == trace
        further = handed_on(visit.span)
        assert further
        assert further["tracestate"] == "vendor=1"
        door.leave(visit, 500)
        (request,) = collector.trace(trace, 1)
        assert further["traceparent"] == f"00-{trace}-{request.id}-01"
        assert (request.status, request.about["error.type"]) == (Status.STATUS_CODE_ERROR, "500")
        assert request.process["service.name"] == "ours"
        assert collector.headers[0]["authorization"] == "Bearer secret"


ENDS = """
import sys, time
from engine.serve.tracing import Tracing

tracing = Tracing(sys.argv[1])
began = time.perf_counter()
for _ in range(6000):  # more than wait to be sent
    with tracing.work("complete", None):
        pass
print(time.perf_counter() - began, flush=True)
time.sleep(1.2)  # the thread that sends is at it
print("ends", flush=True)
"""


def test_a_process_waits_for_no_collector() -> None:
    for hangs in (True, False):
        with collecting() as collector:
            collector.free.clear()
            address = collector.url if hangs else f"http://127.0.0.1:{free_port()}"
            with subprocess.Popen([sys.executable, "-c", ENDS, address], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout
                assert float(process.stdout.readline()) < 9  # it would try for 10 s
                assert process.stdout.readline() == "ends\n"
                began = time.perf_counter()
                assert process.wait(60) == 0
                assert time.perf_counter() - began < 9


def test_without_an_address_there_is_nothing() -> None:
    tracing = Tracing(None)
    span = tracing.request("POST", "/v1/completions", {b"traceparent": within(40)[1]["traceparent"].encode()})
    assert span is NO_SPAN
    assert (handed_on(span), trace_id(span)) == (None, "")
    with tracing.work("complete", within(40)[1]) as work:
        assert work.span is NO_SPAN


def test_a_missing_package_is_named(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"pip install 'manta-train\[tracing\]'"):
        deploy(with_values(tiny, {"serve.tracing": "http://localhost:4318"}), {})

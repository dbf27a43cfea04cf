"""Traces of requests, as an OpenTelemetry collector receives them from an endpoint."""

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
from engine.serve.http.middleware import AccessControl, AccessOptions, RequestContext
from engine.serve.http.schemas import CompletionRequest
from engine.serve.jobs import PromptInfo
from engine.serve.llm.completions import JobRejected
from engine.serve.metrics import Metrics
from engine.serve.replica import Replica
from engine.serve.tracing import NO_SPAN, Tracing, trace_headers, trace_id
from tests.engine.serve.clients import wait_for
from tests.engine.serve.http.test_api import writer_and_namer
from tests.ports import free_port

WORD = "zanzibar"  # occurs in the prompts only
PROMPT = f"import {WORD}\n"
CLIENT = "00f067aa0ba902b7"  # the client's span


@dataclass
class ReceivedSpan:
    """A span that the collector received."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    started_at: int  # ns
    ended_at: int
    attributes: dict[str, Any]
    process: dict[str, Any]
    events: dict[str, int]
    status: int


def plain(attributes: Any) -> dict[str, Any]:
    return {attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value")) for attribute in attributes}


@dataclass
class Collector:
    """Receives traces by OTLP over HTTP while `responsive` is set; otherwise its responses wait."""

    spans: list[ReceivedSpan] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_requests: int = 0
    responsive: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def receive(self, path: str, headers: dict[str, str], body: bytes) -> None:
        assert (path, headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        self.bodies.append(body)
        self.headers.append(headers)
        for of_process in ExportTraceServiceRequest.FromString(body).resource_spans:
            process = plain(of_process.resource.attributes)
            for span in (sent for scope in of_process.scope_spans for sent in scope.spans):
                self.spans.append(
                    ReceivedSpan(
                        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind, span.start_time_unix_nano,
                        span.end_time_unix_nano, plain(span.attributes), process, {event.name: event.time_unix_nano for event in span.events},
                        span.status.code,
                    )
                )  # fmt: skip

    def trace(self, trace: str, spans: int) -> list[ReceivedSpan]:
        """Wait for a number of spans of a trace; return them, oldest first."""
        wait_for(lambda: sum(span.trace == trace for span in self.spans) >= spans)
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.started_at)


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    collector.responsive.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.num_requests += 1
            collector.responsive.wait()
            collector.receive(
                self.path,
                {key.lower(): value for key, value in self.headers.items()},
                self.rfile.read(int(self.headers["Content-Length"])),
            )
            response = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(response)))
            self.end_headers()
            self.wfile.write(response)

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
        collector.responsive.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


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


def client_trace(number: int, sampled: bool = True) -> tuple[str, dict[str, str]]:
    """Return a client's trace id, and the header with it."""
    trace = f"{number:032x}"
    return trace, {"traceparent": f"00-{trace}-{CLIENT}-{int(sampled):02x}"}


def test_a_trace_has_spans_of_ingress_replica_and_each_sequence(
    client: httpx.Client, config: Config, collector: Collector, bundles: dict[str, Bundle]
) -> None:
    trace, header = client_trace(1)
    body = {"prompt": PROMPT, "max_tokens": 8, "n": 2, "temperature": 0}
    response = client.post("/v1/completions", json=body, headers=header | {"X-Request-Id": "asked-1"})
    assert response.status_code == 200
    usage = response.json()["usage"]
    spans = collector.trace(trace, 8)
    (request,) = [span for span in spans if span.parent == CLIENT]
    (replica,) = [span for span in spans if span.parent == request.id]
    phases = [span for span in spans if span.parent == replica.id]
    assert (request.name, request.kind, request.status) == ("POST /v1/completions", Sent.SPAN_KIND_SERVER, Status.STATUS_CODE_UNSET)  # fmt: skip
    version = bundles["writer"].hash[:12]
    assert request.attributes == {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "writer", "manta.version": version,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": 16, "manta.request": "asked-1",
    }  # fmt: skip
    assert replica.name == "replica complete"
    assert (replica.process["manta.version"], replica.process["service.name"]) == (version, "manta")
    assert replica.process["service.instance.id"]
    for choice in (0, 1):
        queue, prefill, generation = [span for span in phases if span.attributes["manta.choice"] == choice]
        assert [span.name for span in (queue, prefill, generation)] == ["queue", "prefill", "generation"]
        assert request.started_at < replica.started_at < queue.started_at
        assert queue.ended_at == prefill.started_at
        assert prefill.ended_at == generation.started_at
        assert generation.ended_at < replica.ended_at < request.ended_at
        assert prefill.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert generation.attributes["gen_ai.usage.output_tokens"] == 8
    cached_tokens = [span.attributes["manta.cached_tokens"] for span in phases if span.name == "prefill"]
    assert sum(cached_tokens) == usage["prompt_tokens_details"]["cached_tokens"]
    assert replica.events == {"first token": min(span.started_at for span in phases if span.name == "generation")}
    assert len(spans) == len(phases) + 2 == 8
    lines = [json.loads(line) for line in (config.run_dir / "logs" / "access.jsonl").read_text().splitlines()]
    assert [line["trace"] for line in lines if line["request"] == "asked-1"] == [trace]


def test_a_streams_span_has_the_first_token_event(client: httpx.Client, collector: Collector) -> None:
    trace, header = client_trace(2)
    body = {"messages": [{"role": "user", "content": WORD}], "max_tokens": 6, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body, headers=header) as response:
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
    request, replica, *phases = collector.trace(trace, 5)
    assert (request.name, replica.name) == ("POST /v1/chat/completions", "replica stream")
    assert (request.attributes["gen_ai.operation.name"], request.attributes["gen_ai.usage.output_tokens"]) == (
        "chat",
        6,
    )
    assert [span.name for span in phases] == ["queue", "prefill", "generation"]
    assert request.started_at < replica.events["first token"] < request.events["first token"] < request.ended_at


def test_other_tasks_are_traced(client: httpx.Client, collector: Collector) -> None:
    for number, path, work in ((3, "/v1/classify", "classify"), (4, "/v1/embeddings", "embed")):
        trace, header = client_trace(number)
        body = {"model": "namer", "input": [f"return {WORD}", "pass"]}
        assert client.post(path, json=body, headers=header).status_code == 200
        request, replica = collector.trace(trace, 2)
        assert (request.name, replica.name, replica.parent) == (f"POST {path}", f"replica {work}", request.id)
        assert request.attributes["gen_ai.usage.input_tokens"] > 2
        assert request.attributes.get("gen_ai.operation.name") == {"embed": "embeddings"}.get(work)


def test_a_refused_request_is_no_error_span(client: httpx.Client, collector: Collector) -> None:
    trace, header = client_trace(5)
    body = {"model": "nobody", "prompt": PROMPT}
    assert client.post("/v1/completions", json=body, headers=header).status_code == 404
    (request,) = collector.trace(trace, 1)
    assert (request.attributes["http.response.status_code"], request.status) == (404, Status.STATUS_CODE_UNSET)
    assert "gen_ai.request.model" not in request.attributes
    trace, header = client_trace(6)
    assert client.post("/v1/completions", json={"prompt": PROMPT * 30}, headers=header).status_code == 400
    request, replica = collector.trace(trace, 2)
    assert {request.status, replica.status} == {Status.STATUS_CODE_UNSET}
    trace, header = client_trace(7)
    assert client.post(f"/v1/{WORD}", json={}, headers=header).status_code == 404
    (request,) = collector.trace(trace, 1)
    assert (request.name, "http.route" in request.attributes) == ("POST", False)


def test_the_clients_sampling_decision_holds_and_get_is_not_traced(client: httpx.Client, collector: Collector) -> None:
    unsampled, header = client_trace(8, sampled=False)
    body = {"prompt": PROMPT, "max_tokens": 2}
    assert client.post("/v1/completions", json=body, headers=header).status_code == 200
    read_only, header = client_trace(9)
    assert client.get("/v1/models", headers=header).status_code == 200
    sampled, header = client_trace(10)
    assert client.post("/v1/completions", json=body, headers=header).status_code == 200
    assert len(collector.trace(sampled, 5)) == 5
    assert not [span for span in collector.spans if span.trace in (unsampled, read_only)]
    before = len(collector.spans)
    assert client.post("/v1/completions", json=body, headers={"traceparent": "nonsense"}).status_code == 200
    wait_for(lambda: len(collector.spans) >= before + 5)
    own = collector.spans[before:]
    assert len({span.trace for span in own}) == 1
    assert sorted(span.parent == "" for span in own) == [False, False, False, False, True]


def test_a_hanging_collector_does_not_affect_clients(client: httpx.Client, collector: Collector) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    expected = client.post("/v1/completions", json=body).json()["choices"]
    collector.responsive.clear()
    try:
        num_requests = collector.num_requests
        for _ in range(30):
            assert client.post("/v1/completions", json=body).json()["choices"] == expected
        wait_for(lambda: collector.num_requests >= num_requests + 2)  # both processes wait for it
        assert client.get("/readyz").status_code == 200
        started_at = time.perf_counter()
        for _ in range(30):
            assert client.post("/v1/completions", json=body).json()["choices"] == expected
        assert time.perf_counter() - started_at < 100  # 10 s each if they waited
    finally:
        collector.responsive.set()
    trace, header = client_trace(11)
    client.post("/v1/completions", json=body, headers=header)
    assert len(collector.trace(trace, 5)) == 5  # export continues once the collector is back


def test_no_text_of_requests_is_exported(client: httpx.Client, collector: Collector) -> None:
    trace, header = client_trace(12)
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "user": f"user of {WORD}"}
    text = client.post("/v1/completions", json=body, headers=header).json()["choices"][0]["text"]
    collector.trace(trace, 5)
    sent = b"".join(collector.bodies)
    assert WORD.encode() not in sent
    assert len(text) > 30
    assert not [i for i in range(len(text) - 15) if text[i : i + 15].encode() in sent]


def test_aborted_and_failed_jobs_are_marked(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    job = CompletionRequest(prompt=PROMPT, max_tokens=100, temperature=0, stream=True).job()

    async def hang_up(replica: Replica, header: dict[str, str]) -> None:
        stream = replica.stream(job, header)
        assert isinstance(await anext(stream), PromptInfo)
        await stream.aclose()

    with collecting() as collector:
        replica = Replica(str(bundles["writer"].folder), asdict(ServeConfig(tracing=collector.url)))
        trace, header = client_trace(20)
        asyncio.run(hang_up(replica, header))
        work, *phases = collector.trace(trace, 4)
        assert (work.parent, work.attributes["manta.cancelled"], work.status) == (
            CLIENT,
            True,
            Status.STATUS_CODE_UNSET,
        )
        assert [span.name for span in phases] == ["queue", "prefill", "generation"]
        for number, error in ((21, RuntimeError(WORD)), (22, JobRejected(WORD, status=503)), (23, JobRejected(WORD))):
            with contextlib.suppress(type(error)), replica.tracing.replica_span("complete", client_trace(number)[1]):
                raise error
        lost, late, wrong = (collector.trace(client_trace(number)[0], 1)[0] for number in (21, 22, 23))
        failed = Status.STATUS_CODE_ERROR
        assert (lost.status, lost.attributes["error.type"]) == (failed, "RuntimeError")
        assert (late.status, late.attributes["error.type"]) == (failed, "503")
        assert (wrong.status, "error.type" in wrong.attributes) == (Status.STATUS_CODE_UNSET, False)
        assert WORD.encode() not in b"".join(collector.bodies)


def test_a_server_error_is_an_error_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with collecting() as collector:
        control = AccessControl(AccessOptions(tracing=collector.url), Metrics(), {"/v1/completions"})
        trace, header = client_trace(30)
        headers = [(b"traceparent", header["traceparent"].encode()), (b"tracestate", b"vendor=1")]
        context: RequestContext = control.begin_request(
            {"method": "POST", "path": "/v1/completions", "headers": headers}
        )
        assert trace_id(context.span) == trace
        headers_out = trace_headers(context.span)
        assert headers_out
        assert headers_out["tracestate"] == "vendor=1"
        control.end_request(context, 500)
        (request,) = collector.trace(trace, 1)
        assert headers_out["traceparent"] == f"00-{trace}-{request.id}-01"
        assert (request.status, request.attributes["error.type"]) == (Status.STATUS_CODE_ERROR, "500")
        assert request.process["service.name"] == "ours"
        assert collector.headers[0]["authorization"] == "Bearer secret"


TRACED_PROCESS = """
import sys, time
from engine.serve.tracing import Tracing

tracing = Tracing(sys.argv[1])
started_at = time.perf_counter()
for _ in range(6000):  # more than the export queue holds
    with tracing.replica_span("complete", None):
        pass
print(time.perf_counter() - started_at, flush=True)
time.sleep(1.2)  # the export thread is sending
print("ends", flush=True)
"""


def test_exit_does_not_wait_for_the_collector() -> None:
    for hangs in (True, False):
        with collecting() as collector:
            collector.responsive.clear()
            address = collector.url if hangs else f"http://127.0.0.1:{free_port()}"
            with subprocess.Popen(
                [sys.executable, "-c", TRACED_PROCESS, address], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout
                assert float(process.stdout.readline()) < 9  # an exporter that waits tries for 10 s
                assert process.stdout.readline() == "ends\n"
                started_at = time.perf_counter()
                assert process.wait(60) == 0
                assert time.perf_counter() - started_at < 9


def test_without_an_address_there_are_no_spans() -> None:
    tracing = Tracing(None)
    span = tracing.request_span(
        "POST", "/v1/completions", {b"traceparent": client_trace(40)[1]["traceparent"].encode()}
    )
    assert span is NO_SPAN
    assert (trace_headers(span), trace_id(span)) == (None, "")
    with tracing.replica_span("complete", client_trace(40)[1]) as work:
        assert work.span is NO_SPAN


def test_a_missing_exporter_is_named(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"pip install 'manta-train\[tracing\]'"):
        deploy(with_values(tiny, {"serve.tracing": "http://localhost:4318"}), {})

"""Spans of requests for OpenTelemetry, sent to a collector by OTLP over HTTP.

A trace has the ingress' span of a request, within the client's own trace where the client tells one
(https://www.w3.org/TR/trace-context); below it that of the replica; and below that when each completion waited, read its
prompt and wrote. Spans hold names, counts and times, called as OpenTelemetry calls them where it has a name
(https://opentelemetry.io/docs/specs/semconv), and no text of a prompt, an answer or an error. A thread sends them; what a
collector doesn't take in time is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from engine.serve.llm.engine import Completion  # with torch, which the ingress needs not

NO_SPAN = INVALID_SPAN
SEND_EVERY_MS = 1000  # less than Serve lets a replica live after its last request
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
FIRST_TOKEN = "first token"

Trace = dict[str, str]  # the headers that hand a trace on: traceparent, and tracestate if there is one
_HEADERS = TraceContextTextMapPropagator()


@dataclass
class Work:
    """A replica's part of a request."""

    span: Span
    completions: Sequence[Completion] = ()  # that it writes


class Tracing:
    """Makes the spans of one process; without an address there are none."""

    def __init__(self, address: str | None, about: Mapping[str, str] | None = None) -> None:
        """Send to a collector's address; `about` the process is told with each span. Raises UserError without the exporter."""
        self._tracer = make_tracer(address, about or {}) if address else None

    def request(self, method: str, route: str, headers: Mapping[bytes, bytes]) -> Span:
        """Begin the span of a request, in the client's trace if its headers tell one; `route`: none of an unknown path."""
        if self._tracer is None:
            return NO_SPAN
        told = {key: headers[key.encode()].decode("latin-1") for key in _HEADERS.fields if key.encode() in headers}
        about = {"http.request.method": method, "http.route": route, "gen_ai.operation.name": OPERATIONS.get(route, "")}
        within = _HEADERS.extract(told, Context())
        known = {key: value for key, value in about.items() if value}
        return self._tracer.start_span(f"{method} {route}".rstrip(), within, SpanKind.SERVER, known)

    @contextlib.contextmanager
    def work(self, name: str, trace: Trace | None) -> Iterator[Work]:
        """Have a span for what a replica does, within the trace that the ingress handed on."""
        if self._tracer is None:
            yield Work(NO_SPAN)
            return
        work = Work(self._tracer.start_span(f"replica {name}", _HEADERS.extract(trace or {}, Context())))
        try:
            yield work
        except (asyncio.CancelledError, GeneratorExit):  # the client has hung up
            work.span.set_attribute("manta.cancelled", True)
            raise
        except Exception as error:
            status = getattr(error, "status", None)
            if status is None or status >= 500:  # else the request is at fault
                fail(work.span, str(status or type(error).__name__))
            raise
        finally:
            if work.span.is_recording():
                self._tell_phases(self._tracer, work)
            work.span.end()

    @staticmethod
    def _tell_phases(tracer: Tracer, work: Work) -> None:
        """Add a span each for the wait, the reading and the writing of completions, as far as they came."""
        now, within = time.monotonic(), set_span_in_context(work.span, Context())
        ahead = time.time() - now

        def epoch_ns(moment: float) -> int:
            return int((moment + ahead) * 1e9)

        for index, it in enumerate(work.completions):
            over = it.ended_at or now  # its reader may have ended it
            phases = [
                ("queue", it.queued_at, it.placed_at, {}),
                ("prefill", it.placed_at, it.first_at, {"gen_ai.usage.input_tokens": len(it.prompt), "manta.cached_tokens": it.reused}),
                ("generation", it.first_at, over, {"gen_ai.usage.output_tokens": len(it.tokens)}),
            ]  # fmt: skip
            for name, began, ended, about in phases:
                if began:
                    span = tracer.start_span(name, within, attributes=about | {"manta.choice": index}, start_time=epoch_ns(began))  # fmt: skip
                    span.end(epoch_ns(ended or over))
        if first := min((it.first_at for it in work.completions if it.first_at), default=0.0):
            work.span.add_event(FIRST_TOKEN, timestamp=epoch_ns(first))


def fail(span: Span, kind: str) -> None:
    """Mark a span as failed by an error of a kind; its message may quote a text, so it isn't told."""
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def handed_on(span: Span) -> Trace | None:
    """Return what another process needs to go on with a span's trace; None where there is no trace."""
    if not span.get_span_context().is_valid:
        return None
    headers: Trace = {}
    _HEADERS.inject(headers, set_span_in_context(span, Context()))
    return headers


def trace_id(span: Span) -> str:
    """Return the 32 digits of a span's trace; empty where there is none."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def make_tracer(address: str, about: Mapping[str, str]) -> Tracer:
    """Return what makes spans and sends them to a collector's address. Raises UserError without the exporter.

    The variables OTEL_* say the rest: headers, certificates, sampling, the service's name.
    """
    sender = exporter(address)
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "manta")
    # A process that ends doesn't wait for a collector that is away.
    provider = TracerProvider(resource=Resource.create({"service.name": name, **about}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(sender, schedule_delay_millis=SEND_EVERY_MS))
    return provider.get_tracer("manta")


def exporter(address: str) -> SpanExporter:
    """Return what sends to a collector's address. Raises UserError where its package is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UserError("serve.tracing needs OpenTelemetry's exporter: pip install 'manta-train[tracing]'") from error
    return OTLPSpanExporter(f"{address.rstrip('/')}/v1/traces")

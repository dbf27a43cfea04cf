"""Spans of requests for OpenTelemetry, sent to a collector by OTLP over HTTP.

A trace has the ingress' span of a request, within the client's own trace where the client sends one
(https://www.w3.org/TR/trace-context); below it the replica's span; and below that the queue, prefill and generation of
each sequence. Spans hold names, counts and times, named after OpenTelemetry's conventions
(https://opentelemetry.io/docs/specs/semconv), and no text of a prompt, a response or an error. A thread sends them; what a
collector doesn't take in time is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from engine.serve.llm.sequence import Sequence  # imports torch, which the ingress does not need

NO_SPAN = INVALID_SPAN
EXPORT_INTERVAL_MS = 1000  # shorter than a replica lives after its last request
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
FIRST_TOKEN = "first token"

TraceHeaders = dict[str, str]  # traceparent, and tracestate if there is one
_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass
class ReplicaSpan:
    """The span of a replica's part of a request."""

    span: Span
    sequences: Iterable[Sequence] = ()  # that it generates


class Tracing:
    """Makes the spans of one process; none without a collector's address."""

    def __init__(self, address: str | None, resource: Mapping[str, str] | None = None) -> None:
        """Send to a collector's address, with `resource` attributes of the process. Raises UserError without the exporter."""
        self._tracer = make_tracer(address, resource or {}) if address else None

    def request_span(self, method: str, route: str, headers: Mapping[bytes, bytes]) -> Span:
        """Start the span of a request, in the client's trace if its headers name one; `route`: empty for an unknown path."""
        if self._tracer is None:
            return NO_SPAN
        parent = {key: headers[key.encode()].decode("latin-1") for key in _PROPAGATOR.fields if key.encode() in headers}
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "gen_ai.operation.name": OPERATIONS.get(route, ""),
        }
        known = {key: value for key, value in attributes.items() if value}
        context = _PROPAGATOR.extract(parent, Context())
        return self._tracer.start_span(f"{method} {route}".rstrip(), context, SpanKind.SERVER, known)

    @contextlib.contextmanager
    def replica_span(self, name: str, headers: TraceHeaders | None) -> Iterator[ReplicaSpan]:
        """Open a span for a replica's work, within the trace whose headers the ingress sent."""
        if self._tracer is None:
            yield ReplicaSpan(NO_SPAN)
            return
        work = ReplicaSpan(self._tracer.start_span(f"replica {name}", _PROPAGATOR.extract(headers or {}, Context())))
        try:
            yield work
        except (asyncio.CancelledError, GeneratorExit):  # the client has hung up
            work.span.set_attribute("manta.cancelled", True)
            raise
        except Exception as error:
            status = getattr(error, "status", None)
            if status is None or status >= 500:  # below 500 the request is at fault
                set_error(work.span, str(status or type(error).__name__))
            raise
        finally:
            if work.span.is_recording():
                self._add_phases(self._tracer, work)
            work.span.end()

    @staticmethod
    def _add_phases(tracer: Tracer, work: ReplicaSpan) -> None:
        """Add a span each for the queue, prefill and generation of the sequences, as far as they came."""
        now, context = time.monotonic(), set_span_in_context(work.span, Context())
        offset = time.time() - now

        def epoch_ns(moment: float) -> int:
            return int((moment + offset) * 1e9)

        for index, sequence in enumerate(work.sequences):
            end = sequence.finished_at or now  # 0: still running when its reader stopped
            phases = [
                ("queue", sequence.queued_at, sequence.scheduled_at, {}),
                ("prefill", sequence.scheduled_at, sequence.first_token_at, {"gen_ai.usage.input_tokens": len(sequence.prompt), "manta.cached_tokens": sequence.num_cached_tokens}),
                ("generation", sequence.first_token_at, end, {"gen_ai.usage.output_tokens": len(sequence.tokens)}),
            ]  # fmt: skip
            for name, start, stop, attributes in phases:
                if start:
                    span = tracer.start_span(name, context, attributes=attributes | {"manta.choice": index}, start_time=epoch_ns(start))  # fmt: skip
                    span.end(epoch_ns(stop or end))
        if first := min(
            (sequence.first_token_at for sequence in work.sequences if sequence.first_token_at), default=0.0
        ):
            work.span.add_event(FIRST_TOKEN, timestamp=epoch_ns(first))


def set_error(span: Span, error_type: str) -> None:
    """Mark a span as failed; the error's message may quote a text, so it is left out."""
    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR)


def trace_headers(span: Span) -> TraceHeaders | None:
    """Return the headers by which another process continues a span's trace; None where there is no trace."""
    if not span.get_span_context().is_valid:
        return None
    headers: TraceHeaders = {}
    _PROPAGATOR.inject(headers, set_span_in_context(span, Context()))
    return headers


def trace_id(span: Span) -> str:
    """Return the 32 digits of a span's trace; empty where there is none."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def make_tracer(address: str, resource: Mapping[str, str]) -> Tracer:
    """Return a tracer that sends its spans to a collector's address. Raises UserError without the exporter.

    The variables OTEL_* set the rest: headers, certificates, sampling, the service's name.
    """
    exporter = make_exporter(address)
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "manta")
    # Do not wait at exit for a collector that is away.
    provider = TracerProvider(resource=Resource.create({"service.name": name, **resource}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_INTERVAL_MS))
    return provider.get_tracer("manta")


def make_exporter(address: str) -> SpanExporter:
    """Return an exporter to a collector's address. Raises UserError where its package is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UserError("serve.tracing needs OpenTelemetry's exporter: pip install 'manta-train[tracing]'") from error
    return OTLPSpanExporter(f"{address.rstrip('/')}/v1/traces")

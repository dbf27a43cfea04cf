"""Every request passes here: it gets an id, is authenticated, and is logged and counted when it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from starlette.middleware.cors import CORSMiddleware

from engine.config import Config
from engine.data.pii_masking import make_masker
from engine.errors import UserError
from engine.serve.http.access_log import AccessLog
from engine.serve.http.api_keys import ApiKey, ApiKeys
from engine.serve.http.errors import ApiError
from engine.serve.http.rate_limits import RateLimiter
from engine.serve.http.transcriptions import PATH as TRANSCRIPTIONS
from engine.serve.metrics import Metrics
from engine.serve.tracing import NO_SPAN, Span, Tracing, set_error, trace_id

PUBLIC_PATHS = {"/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/favicon.ico"}  # need no key
PUBLIC_PREFIX = "/page/"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
MAX_LOGGED_CHARACTERS = 2000  # of a prompt

Scope = dict[str, Any]


@dataclass(frozen=True)
class AccessOptions:
    """Who may send requests, within which bounds, and where they are logged."""

    keys_file: str | None = None
    keys_text: str = ""  # content of the variable MANTA_KEYS
    origins: tuple[str, ...] = ()
    log_file: str | None = None
    log_prompts: bool = False
    records_dir: str = "feedback"
    body_bytes: int = 2**20
    audio_bytes: int = 25 * 2**20
    body_timeout_s: float = 30.0
    tracing: str | None = None  # address of an OpenTelemetry collector


def access_options(config: Config, keys_text: str) -> AccessOptions:
    """Return the access options of a config's endpoint; `keys_text` is the content of the variable MANTA_KEYS.

    Raises UserError where it would listen beyond loopback without keys, and for keys that cannot be read.
    """
    options = config.serve
    keys = ApiKeys(config.keys_file, keys_text)
    if not (keys.required or options.open or is_loopback(options.host)):
        raise UserError(
            f"serve.host={options.host} is open to the network and there are no keys: make one with `manta key new name=ALICE`, "
            "or set serve.open=true to allow requests from anyone who can reach the address"
        )
    run_folder = config.run_dir.absolute()
    return AccessOptions(
        str(config.keys_file), keys_text, tuple(options.origins), str(run_folder / "logs" / "access.jsonl"), options.log_prompts,
        str(Path(options.records_dir or run_folder / "feedback").absolute()), options.max_body_bytes, options.max_audio_bytes, options.body_timeout_s, options.tracing,
    )  # fmt: skip


def access_options_from(plain: dict[str, Any]) -> AccessOptions:
    """Return access options from what `dataclasses.asdict` and JSON have made of them."""
    return AccessOptions(**plain | {"origins": tuple(plain["origins"])})


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may resolve to any address
        return False


@dataclass
class RequestContext:
    """One request, from its head to the end of its response."""

    id: str
    method: str
    path: str
    started_at: float  # on time.perf_counter
    key: ApiKey | None = None
    model: str = ""
    adapter: str = ""  # of the model
    version: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: bool = False  # after the response had begun
    reserved_tokens: int = 0  # charged to the key's rate limit in advance
    body: bytes = b""
    prompts: list[str] = field(default_factory=list)  # kept only where prompts are logged
    span: Span = NO_SPAN

    @property
    def requested_model(self) -> str:
        """The model's id in the request: with its adapter."""
        return f"{self.model}:{self.adapter}" if self.adapter else self.model

    @property
    def metric_labels(self) -> tuple[str, str, str]:
        """Model, version and key."""
        return self.model, self.version, self.key_name

    @property
    def key_name(self) -> str:
        """Name of the API key; empty without one."""
        return self.key.name if self.key else ""

    @property
    def elapsed_s(self) -> float:
        """Time since the request came."""
        return time.perf_counter() - self.started_at


class AccessControl:
    """Authenticates requests and applies rate limits; logs, counts and traces them when they end."""

    def __init__(
        self, options: AccessOptions, metrics: Metrics, paths: set[str], rate_limiter: RateLimiter | None = None
    ) -> None:
        """Read the keys; metrics and traces name `paths`, and count all others together.

        `rate_limiter`: of the access control that this one replaces, so that keys' limits go on. Raises UserError.
        """
        self.options, self.metrics, self.paths = options, metrics, paths
        self.keys = ApiKeys(Path(options.keys_file) if options.keys_file else None, options.keys_text)
        self.rate_limiter, self.tracing = rate_limiter or RateLimiter(), Tracing(options.tracing)
        self.mask = make_masker(["emails", "secrets"])
        self.log = logging.Logger("manta.access")
        if options.log_file:
            Path(options.log_file).parent.mkdir(parents=True, exist_ok=True)
            self.log.addHandler(AccessLog(options.log_file))

    def begin_request(self, scope: Scope) -> RequestContext:
        """Return a new request's context. Its id is the client's X-Request-Id if that is valid, else a new one."""
        headers = dict(scope["headers"])
        header = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = header if REQUEST_ID.fullmatch(header) else str(uuid.uuid4())
        self.metrics.in_flight.inc()
        context = RequestContext(request_id, scope["method"], scope["path"], time.perf_counter())
        if context.method == "POST":  # the page at / polls the other routes
            route = context.path if context.path in self.paths else ""
            context.span = self.tracing.request_span(context.method, route, headers)
        return context

    def authenticate(self, context: RequestContext, scope: Scope) -> None:
        """Find the request's key, and charge it a request. Raises ApiError without a valid key, and over its rate limit."""
        if context.path in PUBLIC_PATHS or context.path.startswith(PUBLIC_PREFIX) or not self.keys.required:
            return
        kind, _, secret = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise ApiError(
                401, "this endpoint requires an API key: send Authorization: Bearer KEY", code="missing_api_key"
            )
        now = time.time()
        key = self.keys.find(secret.strip(), now)
        if key is None:
            raise ApiError(401, "this key is unknown here: check it, or ask for a new one", code="invalid_api_key")
        context.key = key
        if (state := key.state(now)) != "active":
            raise ApiError(401, f"the key '{key.name}' is {state}: ask for a new one", code="invalid_api_key")
        if context.method == "POST":  # other routes are not limited: the page at / polls them
            check_rate(self.rate_limiter.charge_request(key, time.monotonic()), f"{key.requests_per_minute} requests")

    def reserve_tokens(self, context: RequestContext, tokens: int) -> None:
        """Charge a request's key the most tokens that it may use. Raises ApiError over the key's rate limit."""
        if context.key:
            wait_s = self.rate_limiter.reserve_tokens(context.key, tokens, time.monotonic())
            check_rate(wait_s, f"{context.key.tokens_per_minute} tokens")
            context.reserved_tokens = tokens

    def end_request(self, context: RequestContext, status: int) -> None:
        """Settle the reserved tokens, count the request, end its span, and log it."""
        if context.key:
            used = context.prompt_tokens + context.completion_tokens
            if status == 499 and not used:  # aborted before its usage is known: it is charged what was reserved
                used = context.reserved_tokens
            self.rate_limiter.settle_tokens(context.key, context.reserved_tokens, used)
        path = context.path if context.path in self.paths else "other"
        self.metrics.in_flight.dec()
        self.metrics.requests.labels(path, *context.metric_labels, status).inc()
        self.metrics.latency.labels(path, *context.metric_labels).observe(context.elapsed_s)
        if context.span.is_recording():
            self._end_span(context, status)
        if self.options.log_file:
            self.log.info(self._log_line(context, status))

    def _end_span(self, context: RequestContext, status: int) -> None:
        context.span.set_attributes({"manta.request": context.id, "http.response.status_code": status})
        if context.model:
            context.span.set_attributes({
                "gen_ai.request.model": context.requested_model, "manta.version": context.version,
                "gen_ai.usage.input_tokens": context.prompt_tokens, "gen_ai.usage.output_tokens": context.completion_tokens,
            })  # fmt: skip
        if status >= 500:
            set_error(context.span, str(status))
        context.span.end()

    def _log_line(self, context: RequestContext, status: int) -> str:
        line: dict[str, Any] = {
            "time": round(time.time(), 3), "request": context.id, "method": context.method, "path": context.path[:256],
            "status": status, "milliseconds": round(1000 * context.elapsed_s, 2), "key": context.key_name,
            "model": context.model, "version": context.version,
            "read": context.prompt_tokens, "written": context.completion_tokens,
        }  # fmt: skip
        if trace := trace_id(context.span):
            line["trace"] = trace
        if self.options.log_prompts and context.prompts:
            assert self.mask
            line["prompts"] = [self.mask(text, Counter())[:MAX_LOGGED_CHARACTERS] for text in context.prompts]
        return json.dumps(line)


def check_rate(wait_s: float, limit: str) -> None:
    """Raise ApiError where a request has to wait for its key's rate limit."""
    if wait_s:
        message = f"over this key's {limit} a minute: try again in {wait_s:.1f} s"
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)


class AccessMiddleware:
    """ASGI middleware: access control around every request, its body read within bounds, CORS where there are origins."""

    def __init__(self, app: Any, access_control: Callable[[], AccessControl]) -> None:
        """Wrap an application; `access_control` returns the one that is in force, which settings may replace."""
        self.app, self.access_control = app, access_control
        self.cors: tuple[AccessControl, Any] | None = None

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Let a request in, or refuse it; count it when it ends."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif not self.access_control().options.origins:
            await self._process(scope, receive, send)
        else:
            await self._with_cors()(scope, receive, send)

    def _with_cors(self) -> Any:
        """Return the middleware with CORS around it."""
        control = self.access_control()
        if not self.cors or self.cors[0] is not control:
            middleware = CORSMiddleware(
                cast(Any, self._process), allow_origins=control.options.origins, allow_methods=["GET", "POST"],
                allow_headers=["*"], expose_headers=["X-Request-Id", "Retry-After"],
            )  # fmt: skip
            self.cors = (control, middleware)
        return self.cors[1]

    async def _process(self, scope: Scope, receive: Any, send: Any) -> None:
        control = self.access_control()
        context = control.begin_request(scope)
        scope.setdefault("state", {})["context"] = context
        status, is_complete = 0, False

        async def send_observed(message: dict[str, Any]) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        raised = False
        try:
            try:
                control.authenticate(context, scope)
                body = await self._read_body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, cast(Any, send_observed))
                return
            if body is None:
                return
            context.body = body
            pending = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive_read_body() -> Any:
                return pending.pop() if pending else await receive()

            await self.app(scope, receive_read_body, send_observed)
        except Exception:
            raised = True
            raise
        finally:
            self.access_control().end_request(
                context, 500 if raised or context.failed else status if is_complete else 499
            )

    async def _read_body(self, scope: Scope, receive: Any) -> bytes | None:
        """Return a request's whole body; None if the client hung up. Raises ApiError for one that is too large or slow."""
        options = self.access_control().options
        max_bytes = options.audio_bytes if scope["path"] == TRANSCRIPTIONS else options.body_bytes
        timeout_s = options.body_timeout_s
        content_length = int(dict(scope["headers"]).get(b"content-length", b"0"))
        body, more = bytearray(), content_length <= max_bytes
        try:
            async with asyncio.timeout(timeout_s):
                while more and len(body) <= max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError(408, f"the request's body did not come within {timeout_s:g} s: send it again") from error
        if max(content_length, len(body)) > max_bytes:
            raise ApiError(413, f"the request is over {max_bytes:,} bytes: send less")
        return bytes(body)

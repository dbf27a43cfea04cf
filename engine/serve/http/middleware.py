"""Every request passes here: it gets a name, shows its key, and leaves a line in the log and a count."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from starlette.middleware.cors import CORSMiddleware

from engine.config import Config
from engine.data.masking import masking
from engine.errors import UserError
from engine.serve.http.access_log import AccessLog
from engine.serve.http.api_keys import Key, Keys
from engine.serve.http.errors import ApiError
from engine.serve.http.rate_limits import Limits
from engine.serve.http.transcriptions import PATH as TRANSCRIPTIONS
from engine.serve.metrics import Metrics
from engine.serve.tracing import NO_SPAN, Span, Tracing, fail, trace_id

OPEN = {"/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/favicon.ico"}  # without a key
OPEN_FOLDER = "/page/"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROMPT_CHARACTERS = 2000  # of a prompt in the log

Scope = dict[str, Any]


@dataclass(frozen=True)
class Access:
    """Who may ask, and where it is written down."""

    keys_file: str | None = None
    keys_text: str = ""  # of the variable MANTA_KEYS
    origins: tuple[str, ...] = ()
    log_file: str | None = None
    log_prompts: bool = False
    records_dir: str = "feedback"
    body_bytes: int = 2**20
    audio_bytes: int = 25 * 2**20
    body_timeout_s: float = 30.0
    tracing: str | None = None  # address of a collector


def access_for(config: Config, keys_text: str) -> Access:
    """Return who may ask the endpoint of a config; `keys_text` is that of the variable MANTA_KEYS.

    Raises UserError where it would listen beyond loopback without keys, and for keys that cannot be read.
    """
    options = config.serve
    keys = Keys(config.keys_file, keys_text)
    if not (keys.required or options.open or is_loopback(options.host)):
        raise UserError(
            f"serve.host={options.host} is open to the network and there are no keys: make one with `manta key new name=ALICE`, "
            "or say serve.open=true if whoever reaches the address may ask"
        )
    run = config.run_dir.absolute()
    return Access(
        str(config.keys_file), keys_text, tuple(options.origins), str(run / "logs" / "access.jsonl"), options.log_prompts,
        str(Path(options.records_dir or run / "feedback").absolute()), options.max_body_bytes, options.max_audio_bytes, options.body_timeout_s, options.tracing,
    )  # fmt: skip


def access_from(plain: dict[str, Any]) -> Access:
    """Return it from what `asdict` and JSON have made of it."""
    return Access(**plain | {"origins": tuple(plain["origins"])})


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may lead anywhere
        return False


@dataclass
class RequestContext:
    """One request, and what became of it."""

    id: str
    method: str
    path: str
    began: float  # on time.perf_counter
    key: Key | None = None
    model: str = ""
    adapter: str = ""  # of the model
    version: str = ""
    read: int = 0  # tokens
    written: int = 0
    failed: bool = False  # after the answer had begun
    reserved: int = 0  # tokens of the key's minute
    body: bytes = b""
    prompts: list[str] = field(default_factory=list)  # kept for the log alone
    span: Span = NO_SPAN

    @property
    def asked(self) -> str:
        """The model as the client asks for it."""
        return f"{self.model}:{self.adapter}" if self.adapter else self.model

    @property
    def who(self) -> tuple[str, str, str]:
        """Labels of its metrics."""
        return self.model, self.version, self.key_name

    @property
    def key_name(self) -> str:
        """Name of the key, if it has one."""
        return self.key.name if self.key else ""

    @property
    def seconds(self) -> float:
        """Time since it came."""
        return time.perf_counter() - self.began


class AccessControl:
    """Lets visits in and out."""

    def __init__(self, access: Access, metrics: Metrics, paths: set[str], limits: Limits | None = None) -> None:
        """Read the keys; `paths` are told in metrics and traces by their names, all others together.

        `limits`: what keys have left, where another door stood here before. Raises UserError.
        """
        self.access, self.metrics, self.paths = access, metrics, paths
        self.keys = Keys(Path(access.keys_file) if access.keys_file else None, access.keys_text)
        self.limits, self.tracing = limits or Limits(), Tracing(access.tracing)
        self.mask = masking(["emails", "secrets"])
        self.log = logging.Logger("manta.access")
        if access.log_file:
            Path(access.log_file).parent.mkdir(parents=True, exist_ok=True)
            self.log.addHandler(AccessLog(access.log_file))

    def visit(self, scope: Scope) -> RequestContext:
        """Begin a visit. Its id is the client's X-Request-Id if that can be one, else what Serve's proxy gave it."""
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        name = asked if REQUEST_ID.fullmatch(asked) else str(uuid.uuid4())
        self.metrics.in_flight.inc()
        visit = RequestContext(name, scope["method"], scope["path"], time.perf_counter())
        if visit.method == "POST":  # the page at / looks at the rest all the time
            visit.span = self.tracing.request(visit.method, visit.path if visit.path in self.paths else "", headers)
        return visit

    def admit(self, visit: RequestContext, scope: Scope) -> None:
        """Find the visit's key. Raises ApiError where it needs one and shows none that holds, or asks too often."""
        if visit.path in OPEN or visit.path.startswith(OPEN_FOLDER) or not self.keys.required:
            return
        kind, _, secret = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise ApiError(401, "this endpoint wants a key: send Authorization: Bearer KEY", code="missing_api_key")
        now = time.time()
        key = self.keys.find(secret.strip(), now)
        if key is None:
            raise ApiError(401, "this key is not known here: check it, or ask for a new one", code="invalid_api_key")
        visit.key = key
        if (state := key.state(now)) != "active":
            raise ApiError(401, f"the key '{key.name}' is {state}: ask for a new one", code="invalid_api_key")
        if visit.method == "POST":  # lists are for free: the page at / looks at them all the time
            self._wait(self.limits.request(key, time.monotonic()), f"{key.requests_per_minute} requests")

    def reserve(self, visit: RequestContext, tokens: int) -> None:
        """Charge a visit's key the most tokens that it may use. Raises ApiError where they are not there yet."""
        if visit.key:
            wait_s = self.limits.reserve(visit.key, tokens, time.monotonic())
            self._wait(wait_s, f"{visit.key.tokens_per_minute} tokens")
            visit.reserved = tokens

    def leave(self, visit: RequestContext, status: int) -> None:
        """Settle the tokens, count, end the span, and write the line."""
        if visit.key:
            used = visit.read + visit.written
            if status == 499 and not used:  # who leaves before it is known what was used pays what was asked
                used = visit.reserved
            self.limits.settle(visit.key, visit.reserved, used)
        path = visit.path if visit.path in self.paths else "other"
        self.metrics.in_flight.dec()
        self.metrics.requests.labels(path, *visit.who, status).inc()
        self.metrics.seconds.labels(path, *visit.who).observe(visit.seconds)
        if visit.span.is_recording():
            self._end(visit, status)
        if self.access.log_file:
            self.log.info(self._line(visit, status))

    def _end(self, visit: RequestContext, status: int) -> None:
        visit.span.set_attributes({"manta.request": visit.id, "http.response.status_code": status})
        if visit.model:
            visit.span.set_attributes({
                "gen_ai.request.model": visit.asked, "manta.version": visit.version,
                "gen_ai.usage.input_tokens": visit.read, "gen_ai.usage.output_tokens": visit.written,
            })  # fmt: skip
        if status >= 500:
            fail(visit.span, str(status))
        visit.span.end()

    def _wait(self, wait_s: float, limit: str) -> None:
        if wait_s:
            told = f"over this key's {limit} a minute: try again in {wait_s:.1f} s"
            raise ApiError(429, told, code="rate_limit_exceeded", retry_after_s=wait_s)

    def _line(self, visit: RequestContext, status: int) -> str:
        line: dict[str, Any] = {
            "time": round(time.time(), 3), "request": visit.id, "method": visit.method, "path": visit.path[:256],
            "status": status, "milliseconds": round(1000 * visit.seconds, 2), "key": visit.key_name,
            "model": visit.model, "version": visit.version, "read": visit.read, "written": visit.written,
        }  # fmt: skip
        if trace := trace_id(visit.span):
            line["trace"] = trace
        if self.access.log_prompts and visit.prompts:
            assert self.mask
            line["prompts"] = [self.mask(text, Counter())[:PROMPT_CHARACTERS] for text in visit.prompts]
        return json.dumps(line)


class Gate:
    """ASGI middleware: a visit through the door, its body read within bounds, CORS where it is asked for."""

    door: ClassVar[AccessControl]  # the ingress sets it before the first request, and with its settings

    def __init__(self, app: Any) -> None:
        self.inner = app
        self.cors: tuple[AccessControl, Any] | None = None

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Let a request in, or answer why not; count it when it leaves."""
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
        elif not self.door.access.origins:
            await self._pass(scope, receive, send)
        else:
            await self._cross_origin()(scope, receive, send)

    def _cross_origin(self) -> Any:
        """Return the door with CORS around it."""
        if not self.cors or self.cors[0] is not self.door:
            around = CORSMiddleware(
                cast(Any, self._pass), allow_origins=self.door.access.origins, allow_methods=["GET", "POST"],
                allow_headers=["*"], expose_headers=["X-Request-Id", "Retry-After"],
            )  # fmt: skip
            self.cors = (self.door, around)
        return self.cors[1]

    async def _pass(self, scope: Scope, receive: Any, send: Any) -> None:
        visit = self.door.visit(scope)
        scope.setdefault("state", {})["visit"] = visit
        status, whole = 0, False

        async def tell(message: dict[str, Any]) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        broken = False
        try:
            try:
                self.door.admit(visit, scope)
                body = await self._body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, cast(Any, tell))
                return
            if body is None:
                return
            visit.body = body
            pending = [{"type": "http.request", "body": body, "more_body": False}]

            async def again() -> Any:
                return pending.pop() if pending else await receive()

            await self.inner(scope, again, tell)
        except Exception:
            broken = True
            raise
        finally:
            self.door.leave(visit, 500 if broken or visit.failed else status if whole else 499)

    async def _body(self, scope: Scope, receive: Any) -> bytes | None:
        """Return a request's whole body; None if the client left. Raises ApiError for one that is too large or slow."""
        access = self.door.access
        most = access.audio_bytes if scope["path"] == TRANSCRIPTIONS else access.body_bytes
        within_s = access.body_timeout_s
        declared = int(dict(scope["headers"]).get(b"content-length", b"0"))
        body, more = bytearray(), declared <= most
        try:
            async with asyncio.timeout(within_s):
                while more and len(body) <= most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError(408, f"the request's body did not come within {within_s:g} s: send it again") from error
        if max(declared, len(body)) > most:
            raise ApiError(413, f"the request is over {most:,} bytes: send less")
        return bytes(body)

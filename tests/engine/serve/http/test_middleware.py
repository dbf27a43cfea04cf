"""The access middleware around a small application: bounds of the body, counts, and what a request costs its key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.serve.http.api_keys import new_key
from engine.serve.http.errors import ApiError
from engine.serve.http.middleware import AccessControl, AccessMiddleware, AccessOptions, RequestContext
from engine.serve.metrics import Metrics

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


@pytest.fixture
def secret(tmp_path: Path) -> str:
    secret, _ = new_key(tmp_path / "keys.json", "alice", None, 100, None)
    return secret


@pytest.fixture
def control(secret: str, tmp_path: Path) -> AccessControl:
    options = AccessOptions(str(tmp_path / "keys.json"), body_bytes=1000, body_timeout_s=0.2)
    return AccessControl(options, Metrics(), {"/v1/x"})


def send_request(
    control: AccessControl, app: App, secret: str, *bodies: bytes, more: bool = False
) -> list[dict[str, Any]]:
    """Send a request's body in parts; return the messages that the application sends."""
    messages = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    messages[-1]["more_body"] = more
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/x",
        "headers": [(b"authorization", f"Bearer {secret}".encode())],
    }
    asyncio.run(AccessMiddleware(app, lambda: control)(scope, receive, send))
    return sent


def requests_by_status(control: AccessControl) -> dict[str, float]:
    """Return {status: requests}."""
    (metric,) = control.metrics.requests.collect()
    return {sample.labels["status"]: sample.value for sample in metric.samples if sample.name.endswith("_total")}


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def test_bodies_are_limited_in_size_and_time(secret: str, control: AccessControl) -> None:
    assert send_request(control, echo, secret, b"a", b"b" * 900, b"c")[1]["body"] == b"a" + b"b" * 900 + b"c"
    assert send_request(control, echo, secret, b"a" * 600, b"b" * 600)[0]["status"] == 413
    assert send_request(control, echo, secret, b"a", more=True)[0]["status"] == 408
    assert requests_by_status(control) == {"200": 1, "413": 1, "408": 1}


def test_requests_are_counted_by_outcome(secret: str, control: AccessControl) -> None:
    async def aborts(scope: dict[str, Any], receive: Any, send: Any) -> None:
        control.reserve_tokens(scope["state"]["context"], 40)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def raises(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def fails(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope["state"]["context"].failed = True
        await echo(scope, receive, send)

    send_request(control, aborts, secret, b"")
    send_request(control, fails, secret, b"")
    with pytest.raises(ZeroDivisionError):
        send_request(control, raises, secret, b"")
    assert send_request(control, echo, "sk-manta-wrong", b"")[0]["status"] == 401
    assert requests_by_status(control) == {"499": 1, "500": 2, "401": 1}
    (in_flight,) = control.metrics.in_flight.collect()
    assert in_flight.samples[0].value == 0


def test_an_aborted_request_is_charged_its_reserved_tokens(secret: str, control: AccessControl) -> None:
    retry_after_s: list[float] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        context: RequestContext = scope["state"]["context"]
        try:
            control.reserve_tokens(context, 40)
        except ApiError as error:
            retry_after_s.append(error.retry_after_s)
            raise
        if len(retry_after_s) == 0:
            context.prompt_tokens, context.completion_tokens = 3, 2
            await echo(scope, receive, send)

    started = time.monotonic()
    send_request(control, app, secret, b"")  # charged 5 of 100
    retry_after_s.append(0)
    send_request(control, app, secret, b"")  # aborted: charged 40
    send_request(control, app, secret, b"")  # aborted: charged 40
    with pytest.raises(ApiError, match="100 tokens a minute"):
        send_request(control, app, secret, b"")
    elapsed_s = time.monotonic() - started
    assert (
        15 - elapsed_s <= retry_after_s[-1] <= 15
    )  # 15 of the 40 tokens are left, and five are refilled every three seconds

"""The gate before an application of a line: what it lets in, what it counts, and what a visit costs its key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.serve.http.api_keys import new_key
from engine.serve.http.errors import ApiError
from engine.serve.http.middleware import Access, AccessControl, Gate, RequestContext
from engine.serve.metrics import Metrics

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


@pytest.fixture
def secret(tmp_path: Path) -> str:
    secret, _ = new_key(tmp_path / "keys.json", "alice", None, 100, None)
    Gate.door = AccessControl(
        Access(str(tmp_path / "keys.json"), body_bytes=1000, body_timeout_s=0.2), Metrics(), {"/v1/x"}
    )
    return secret


def ask(app: App, secret: str, *bodies: bytes, more: bool = False) -> list[dict[str, Any]]:
    """Send a request's body in parts; return what comes back."""
    messages = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    messages[-1]["more_body"] = more
    told: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/x",
        "headers": [(b"authorization", f"Bearer {secret}".encode())],
    }
    asyncio.run(Gate(app)(scope, receive, send))
    return told


def counted() -> dict[str, float]:
    """Return {status: requests}."""
    (metric,) = Gate.door.metrics.requests.collect()
    return {sample.labels["status"]: sample.value for sample in metric.samples if sample.name.endswith("_total")}


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def test_a_body_comes_whole_within_its_bounds(secret: str) -> None:
    assert ask(echo, secret, b"a", b"b" * 900, b"c")[1]["body"] == b"a" + b"b" * 900 + b"c"
    assert ask(echo, secret, b"a" * 600, b"b" * 600)[0]["status"] == 413
    assert ask(echo, secret, b"a", more=True)[0]["status"] == 408
    assert counted() == {"200": 1, "413": 1, "408": 1}


def test_what_becomes_of_a_visit_is_counted(secret: str) -> None:
    async def leaves(scope: dict[str, Any], receive: Any, send: Any) -> None:
        Gate.door.reserve(scope["state"]["visit"], 40)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def breaks(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def fails(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope["state"]["visit"].failed = True
        await echo(scope, receive, send)

    ask(leaves, secret, b"")
    ask(fails, secret, b"")
    with pytest.raises(ZeroDivisionError):
        ask(breaks, secret, b"")
    assert ask(echo, "sk-manta-wrong", b"")[0]["status"] == 401
    assert counted() == {"499": 1, "500": 2, "401": 1}
    (left,) = Gate.door.metrics.in_flight.collect()
    assert left.samples[0].value == 0


def test_who_leaves_early_pays_what_was_asked(secret: str) -> None:
    left: list[float] = []

    async def visit(scope: dict[str, Any], receive: Any, send: Any) -> None:
        one: RequestContext = scope["state"]["visit"]
        try:
            Gate.door.reserve(one, 40)
        except ApiError as error:
            left.append(error.retry_after_s)
            raise
        if len(left) == 0:
            one.read, one.written = 3, 2
            await echo(scope, receive, send)

    began = time.monotonic()
    ask(visit, secret, b"")  # pays 5 of 100
    left.append(0)
    ask(visit, secret, b"")  # leaves: 40
    ask(visit, secret, b"")  # leaves: 40
    with pytest.raises(ApiError, match="100 tokens a minute"):
        ask(visit, secret, b"")
    took = time.monotonic() - began
    assert 15 - took <= left[-1] <= 15  # 15 of the 40 are left, and five come each three seconds

"""The endpoint's own HTTP server: request ids, clients that hang up, and a shutdown that finishes all requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from engine.errors import UserError
from engine.serve.http.server import Server, listen
from tests.ports import free_port


class SlowApp:
    """An ASGI application that responds once it is released, or streams until it is released or cancelled."""

    def __init__(self) -> None:
        self.release, self.num_started, self.num_cancelled = asyncio.Event(), 0, 0
        self.request_ids: list[bytes] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.request_ids.append(dict(scope["headers"])[b"x-request-id"])
        while (await receive()).get("more_body"):
            pass
        self.num_started += 1
        try:
            if scope["path"] == "/stream":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                while not self.release.is_set():
                    await send({"type": "http.response.body", "body": b"x", "more_body": True})
                    await asyncio.sleep(0.01)
            elif scope["path"] == "/slow":
                await self.release.wait()
            if scope["path"] != "/stream":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
            await send({"type": "http.response.body", "body": b"y"})
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def run_with_server(scenario: Callable[[SlowApp, Server, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        app, port = SlowApp(), free_port()
        server = Server(app, listen("127.0.0.1", port))
        await wait_until(lambda: server.server.started)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            await scenario(app, server, client)
        await server.close()

    asyncio.run(run())


def test_each_request_has_an_id() -> None:
    async def scenario(app: SlowApp, server: Server, client: httpx.AsyncClient) -> None:
        first, second = await client.get("/"), await client.post("/", content=b"z")
        own = await client.get("/", headers={"X-Request-Id": "my-1"})
        request_ids = [response.headers["x-request-id"] for response in (first, second, own)]
        assert len(set(request_ids)) == 3
        assert request_ids == [name.decode() for name in app.request_ids]
        assert (request_ids[2], own.text, app.num_cancelled) == ("my-1", "y", 0)

    run_with_server(scenario)


@pytest.mark.parametrize("path", ["/slow", "/stream"])
def test_a_request_is_cancelled_when_its_client_hangs_up(path: str) -> None:
    async def scenario(app: SlowApp, server: Server, client: httpx.AsyncClient) -> None:
        request = asyncio.ensure_future(client.post(path, content=b"z"))
        await wait_until(lambda: app.num_started)
        request.cancel()
        await wait_until(lambda: app.num_cancelled)
        assert (await client.get("/")).text == "y"
        assert (app.num_started, app.num_cancelled) == (2, 1)

    run_with_server(scenario)


def test_closing_finishes_requests_in_flight() -> None:
    async def scenario(app: SlowApp, server: Server, client: httpx.AsyncClient) -> None:
        requests = [asyncio.ensure_future(client.post(path, content=b"z")) for path in ("/slow", "/stream")]
        await wait_until(lambda: app.num_started == 2)
        closing = asyncio.ensure_future(server.close())
        await asyncio.sleep(0.3)
        assert not closing.done()
        app.release.set()
        slow, stream = await asyncio.gather(*requests)
        await closing
        assert (slow.text, stream.text[-1], stream.status_code) == ("y", "y", 200)
        with pytest.raises(httpx.ConnectError):
            await client.get("/")

    run_with_server(scenario)


def test_an_address_that_cannot_be_bound_is_refused() -> None:
    with pytest.raises(UserError, match=r"serve.host=192.0.2.1, serve.port=80 cannot be listened on: "):
        listen("192.0.2.1", 80)  # reserved for documentation: RFC 5737

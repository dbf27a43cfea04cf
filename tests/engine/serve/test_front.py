"""The endpoint's own HTTP server: names, hang-ups, and an end that loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from engine.errors import UserError
from engine.serve.http.server import Server, listen
from tests.engine.serve.test_serve import free_port


class Slow:
    """An ASGI application that answers when it is let go, or in parts until nobody listens."""

    def __init__(self) -> None:
        self.go, self.began, self.cancelled = asyncio.Event(), 0, 0
        self.names: list[bytes] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.names.append(dict(scope["headers"])[b"x-request-id"])
        while (await receive()).get("more_body"):
            pass
        self.began += 1
        try:
            if scope["path"] == "/stream":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                while not self.go.is_set():
                    await send({"type": "http.response.body", "body": b"x", "more_body": True})
                    await asyncio.sleep(0.01)
            elif scope["path"] == "/slow":
                await self.go.wait()
            if scope["path"] != "/stream":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
            await send({"type": "http.response.body", "body": b"y"})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def soon(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def served(work: Callable[[Slow, Server, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        app, port = Slow(), free_port()
        front = Server(app, listen("127.0.0.1", port))
        await soon(lambda: front.server.started)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            await work(app, front, client)
        await front.close()

    asyncio.run(run())


def test_each_request_has_a_name() -> None:
    async def work(app: Slow, front: Server, client: httpx.AsyncClient) -> None:
        first, second = await client.get("/"), await client.post("/", content=b"z")
        own = await client.get("/", headers={"X-Request-Id": "my-1"})
        names = [answer.headers["x-request-id"] for answer in (first, second, own)]
        assert len(set(names)) == 3
        assert names == [name.decode() for name in app.names]
        assert (names[2], own.text, app.cancelled) == ("my-1", "y", 0)

    served(work)


@pytest.mark.parametrize("path", ["/slow", "/stream"])
def test_the_work_of_a_client_that_left_ends(path: str) -> None:
    async def work(app: Slow, front: Server, client: httpx.AsyncClient) -> None:
        asked = asyncio.ensure_future(client.post(path, content=b"z"))
        await soon(lambda: app.began)
        asked.cancel()
        await soon(lambda: app.cancelled)
        assert (await client.get("/")).text == "y"
        assert (app.began, app.cancelled) == (2, 1)

    served(work)


def test_what_was_begun_is_answered_at_its_end() -> None:
    async def work(app: Slow, front: Server, client: httpx.AsyncClient) -> None:
        asked = [asyncio.ensure_future(client.post(path, content=b"z")) for path in ("/slow", "/stream")]
        await soon(lambda: app.began == 2)
        closing = asyncio.ensure_future(front.close())
        await asyncio.sleep(0.3)
        assert not closing.done()
        app.go.set()
        slow, stream = await asyncio.gather(*asked)
        await closing
        assert (slow.text, stream.text[-1], stream.status_code) == ("y", "y", 200)
        with pytest.raises(httpx.ConnectError):
            await client.get("/")

    served(work)


def test_an_address_of_others_is_refused() -> None:
    with pytest.raises(UserError, match=r"serve.host=192.0.2.1, serve.port=80 cannot be listened on: "):
        listen("192.0.2.1", 80)  # of no machine: RFC 5737

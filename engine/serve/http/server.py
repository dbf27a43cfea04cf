"""The endpoint's own HTTP server, in the ingress' process, so that a request is passed on but once: to a replica.

Ray Serve's proxy takes a request in another process and hands it over by an actor's call, message by message, which costs
more than a small model's whole answer. It goes where Serve's own config deploys the endpoint (`engine.serve.export`), for
which each node has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from typing import Any

import uvicorn

from engine.errors import UserError

KEEP_ALIVE_S = 90  # of a connection without a request, as Serve's proxy has it
BACKLOG = 2048  # connections that wait to be taken

Scope = dict[str, Any]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raises UserError where it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # one that replaces a hanging ingress needs not wait
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise UserError(f"serve.host={host}, serve.port={port} cannot be listened on: {error.strerror}") from error
    return taken


class Server:
    """Serves an ASGI application on a socket: names each request, and ends the work of one whose client has left."""

    def __init__(self, app: Any, taken: socket.socket) -> None:
        self.app = app
        config = uvicorn.Config(
            self.answer, interface="asgi3", proxy_headers=False, lifespan="off", ws="none", access_log=False, log_level="error", log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S, backlog=BACKLOG,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]  # they are Ray's
        self.running = asyncio.get_running_loop().create_task(self.server.serve([taken]))

    async def close(self) -> None:
        """Take no more connections, and return once what was begun is answered."""
        self.server.should_exit = True
        await self.running

    async def answer(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request."""
        name = next((value for key, value in scope["headers"] if key == b"x-request-id"), None)
        if name is None:
            name = str(uuid.uuid4()).encode()
            scope["headers"] = [*scope["headers"], (b"x-request-id", name)]
        task = asyncio.current_task()
        assert task
        watch: asyncio.Future[Any] | None = None
        whole = False

        def heard(watched: asyncio.Future[Any]) -> None:
            if not whole and not watched.cancelled():
                task.cancel()

        async def hear() -> Any:
            nonlocal watch
            if watch:
                return await asyncio.shield(watch)
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                watch = asyncio.ensure_future(receive())  # what comes after the body: that the client has left
                watch.add_done_callback(heard)
            return message

        async def tell(message: dict[str, Any]) -> None:
            nonlocal whole
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"x-request-id", name)]}
            else:
                whole = not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, hear, tell)
        except asyncio.CancelledError:
            if not (watch and watch.done()):
                raise
        finally:
            if watch:
                watch.cancel()

"""The endpoint's own HTTP server, in the ingress' process, so that a request crosses one process boundary: to a replica.

Ray Serve's proxy is another process, which forwards a request to the ingress by actor calls, message by message; that
costs more than the whole response of a small model. The proxy is used where Serve's own config deploys the endpoint
(`engine.serve.export`), with one on each node.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from typing import Any

import uvicorn

from engine.errors import UserError

KEEP_ALIVE_S = 90  # of an idle connection, as in Serve's proxy
BACKLOG = 2048  # connections that wait to be accepted

Scope = dict[str, Any]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raises UserError if it cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # a replacement need not wait for a hanging ingress
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(f"serve.host={host}, serve.port={port} cannot be listened on: {error.strerror}") from error
    return listening


class Server:
    """Serves an ASGI application on a socket: gives each request an id, and cancels the handling of one whose client hung up."""

    def __init__(self, app: Any, listening: socket.socket) -> None:
        """Start to serve; `listening` is a bound socket."""
        self.app = app
        config = uvicorn.Config(
            self.handle, interface="asgi3", proxy_headers=False, lifespan="off", ws="none", access_log=False, log_level="error", log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S, backlog=BACKLOG,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]  # they are Ray's
        self.serving = asyncio.get_running_loop().create_task(self.server.serve([listening]))

    async def close(self) -> None:
        """Accept no more connections, and return once all requests in flight are finished."""
        self.server.should_exit = True
        await self.serving

    async def handle(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handle one request."""
        request_id = next((value for key, value in scope["headers"] if key == b"x-request-id"), None)
        if request_id is None:
            request_id = str(uuid.uuid4()).encode()
            scope["headers"] = [*scope["headers"], (b"x-request-id", request_id)]
        task = asyncio.current_task()
        assert task
        after_body: asyncio.Future[Any] | None = None  # the message after the body: the client has hung up
        is_complete = False

        def abort(future: asyncio.Future[Any]) -> None:
            if not is_complete and not future.cancelled():
                task.cancel()

        async def receive_watched() -> Any:
            nonlocal after_body
            if after_body:
                return await asyncio.shield(after_body)
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                after_body = asyncio.ensure_future(receive())
                after_body.add_done_callback(abort)
            return message

        async def send_with_id(message: dict[str, Any]) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"x-request-id", request_id)]}
            else:
                is_complete = not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive_watched, send_with_id)
        except asyncio.CancelledError:
            if not (after_body and after_body.done()):
                raise
        finally:
            if after_body:
                after_body.cancel()

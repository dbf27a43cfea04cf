"""The HTTP interface: OpenAI's paths and error bodies, on FastAPI. Each bundle is a model of its name."""

import asyncio
import contextlib
import socket
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from ray import serve
from starlette.exceptions import HTTPException

from engine.serve.http.errors import ApiError
from engine.serve.http.ingress_sockets import claim_socket, socket_dir
from engine.serve.http.middleware import AccessMiddleware
from engine.serve.http.request_handler import AnsweredRequest, RequestHandler
from engine.serve.http.routes import admin, generate, tasks
from engine.serve.http.server import Server, listen
from engine.serve.metrics import Metric
from engine.serve.routing.loopback import bind_to_loopback
from engine.serve.routing.router import Router

ROUTERS = (admin.router, tasks.router, generate.router)
TABLE_TIMEOUT_S = 20.0


def build_app(handler: RequestHandler) -> FastAPI:
    """Return the application of an ingress."""
    app = FastAPI(title="Manta", description="Bundles behind OpenAI's interface.", docs_url=None, redoc_url=None)
    app.state.handler = handler
    app.add_middleware(AccessMiddleware, access_control=lambda: handler.access_control)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


def route_paths() -> set[str]:
    """Return the paths that metrics and traces name; all others are counted together."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return {"/", "/docs"} | {route.path for route in routes if route.include_in_schema}


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


async def _internal_error(request: Request, error: Exception) -> Response:
    return ApiError(500, f"{type(error).__name__}: this is the endpoint's fault, and in its log").response()


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = [
        str(part)
        for part in first["loc"]
        if part != "body" and not str(part).startswith(("constrained", "list[", "str"))
    ]
    field = location[0] if location and first["type"] != "json_invalid" else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: this endpoint has no such option: leave it out", field).response()
    return ApiError(400, f"{field or 'the body'}: {first['msg']}", field).response()


@serve.ingress()
class Api:
    """The ingress: it holds the routes' application, serves it on a socket of its own, and follows the controller."""

    def __init__(self, controller: str, settings: dict[str, Any], listens: bool) -> None:
        """Take the controller's application and the options of ServeConfig and AccessOptions; `listens`: without Serve's proxy.

        Raises UserError for API keys that cannot be read, and an address that it cannot listen on.
        """
        bind_to_loopback()
        options = settings["options"]
        own_socket = claim_socket(socket_dir(), options["ingresses"]) if options["haproxy"] else None
        self.models = Router.connect(controller, settings, self.apply_settings)
        self.handler = RequestHandler(self.models, settings, route_paths(), own_socket)
        self.server: Server | None = None
        if listens:
            listening = own_socket.listen() if own_socket else listen(options["host"], options["port"])
            self._opening = asyncio.get_running_loop().create_task(self._open(listening))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application: Serve calls this after the constructor."""
        return build_app(self.handler)

    async def __del__(self) -> None:
        """Finish the requests that have come before the process ends: Serve awaits this."""
        if self.server:
            await self.server.close()

    def apply_settings(self, settings: dict[str, Any]) -> None:
        """Use new settings from now on. Raises UserError for API keys that cannot be read; the old settings stay then."""
        self.handler.apply_settings(settings)

    async def check_health(self) -> None:
        """Wait for the first routing table: an ingress that knows no model yet gets no request."""
        with contextlib.suppress(TimeoutError):  # the controller may be away for longer: no reason to restart
            await asyncio.wait_for(self.models.table_received.wait(), TABLE_TIMEOUT_S)

    async def routing_revision(self) -> int:
        """Return the revision of the routing table that this ingress follows."""
        return self.models.revision

    async def local_metrics(self) -> tuple[int, list[Metric]]:
        """Return the number of this ingress, one of several, and its metrics."""
        assert self.handler.own_socket
        return self.handler.own_socket.number, self.handler.metrics.local_metrics()

    async def find_answered(self, request_id: str) -> AnsweredRequest | None:
        """Return the request that this ingress has answered, by its id or its response's id."""
        return self.handler.find_answered(request_id)

    async def _open(self, listening: socket.socket) -> None:
        """Take requests, once there is a routing table, and Serve has built the application and added its exception handlers."""
        await self.check_health()
        while serve.get_replica_context().servable_object is not self:
            await asyncio.sleep(0.01)
        self.server = Server(self.app, listening)  # type: ignore[attr-defined]  # of Serve's own class around this one

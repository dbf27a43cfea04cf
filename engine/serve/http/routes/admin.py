"""The endpoint itself: its pages, health, metrics, models and replicas, and feedback on its answers."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from ray.exceptions import RayActorError

from engine.serve.http.errors import ApiError
from engine.serve.http.request_handler import AnsweredRequest, context_of, handler_of, model_ids, without_prefix
from engine.serve.http.schemas import Feedback
from engine.serve.http.static import SECURITY_HEADERS, SWAGGER_CSS, SWAGGER_JS, page_files

RATINGS = {"up": 1, "down": -1, None: None}

router = APIRouter()
_pages = page_files()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the page on which the models can be tried."""
    return HTMLResponse(_pages["index.html"][0], headers=SECURITY_HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """Return a file that a page loads."""
    if name not in _pages:
        raise ApiError(404, f"there is no {name} here")
    content, media_type = _pages[name]
    return Response(content, media_type=media_type, headers={"Cache-Control": "max-age=3600"})


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """Return Swagger's page of this interface."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json", title="Manta", swagger_js_url=f"/page/{SWAGGER_JS}",
        swagger_css_url=f"/page/{SWAGGER_CSS}", swagger_favicon_url="data:,",
    )  # fmt: skip


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Tell that the ingress lives."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """Answer 200 while every bundle takes traffic, else 503."""
    handler = handler_of(request)
    try:
        await asyncio.gather(*(handler.models.fetch_model_info(name) for name in handler.models))
        infos = handler.infos()
        body = {"status": "ready" if infos else "starting", "models": sorted(infos)}
        return JSONResponse(body, 200 if infos else 503, {"x-manta-table": str(handler.models.revision)})
    except (TimeoutError, RuntimeError, RayActorError) as error:
        return JSONResponse({"status": "starting", "reason": str(error)[:200]}, 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return Prometheus metrics, of the replicas too."""
    handler = handler_of(request)
    await handler.poll_replicas()
    text = handler.metrics.exposition(await handler.ingress_metrics())
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the bundles, and their adapters."""
    handler = handler_of(request)
    infos = await handler.ready_infos()
    data = []
    for model_id, (name, adapter) in sorted(model_ids(infos).items()):
        info = infos[name]
        entry = {"id": model_id, "object": "model", "created": handler.created, "owned_by": "manta", "task": info.task}
        if adapter:
            data.append(entry | {"hash": info.adapters[adapter], "parent": name})
        else:
            data.append(entry | {"hash": info.hash} | handler.models.status(name))
    return {"object": "list", "data": data}


@router.get("/v1/replicas")
async def replicas(request: Request) -> dict[str, Any]:
    """List the replicas that answer: whose, which version, how busy."""
    handler = handler_of(request)
    await handler.poll_replicas()
    data = [{"model": name, **stats} for name, replicas in handler.metrics.replica_stats.items() for stats in replicas]
    return {"object": "list", "data": data}


@router.post("/v1/feedback")
async def feedback(request: Request, body: Feedback) -> Response:
    """Keep what somebody thinks of an answer; of several for one request, the last holds."""
    handler, key_name = handler_of(request), context_of(request).key_name
    answered = handler.find_answered(body.request)
    if answered is None and handler.own_socket:
        answered = next((found for found in await handler.broadcast("find_answered", body.request) if found), None)
    if answered is None:
        answered = AnsweredRequest(without_prefix(body.request), "", "", key_name)
    if answered.key != key_name:
        raise ApiError(404, f"this key has sent no request {body.request}", "request")
    record = {"rating": RATINGS[body.rating], "label": body.label, "text": body.text, "comment": body.comment}
    await handler.store("feedback", answered, record)
    if body.rating:
        handler.metrics.feedback.labels(answered.model, answered.version, body.rating).inc()
        handler.models.record_rating(answered.model, answered.version, body.rating == "down")
    return JSONResponse({"object": "feedback", "request": answered.id, "model": answered.model or None, "stored": True})

"""What the routes share: find a request's model, check it and charge it, count what it used, keep a record of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from fastapi.responses import Response
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from engine.serve.http.errors import ApiError
from engine.serve.http.feedback_store import RecordWriter
from engine.serve.http.ingress_sockets import IngressSocket
from engine.serve.http.middleware import AccessControl, RequestContext, access_options_from
from engine.serve.http.rate_limits import RateLimiter
from engine.serve.http.responses import ChatFormatter, CompletionFormatter
from engine.serve.jobs import Failure, ModelInfo, Prompt
from engine.serve.metrics import Metric, Metrics
from engine.serve.routing.router import Router
from engine.serve.tracing import trace_headers

CHARACTERS_PER_TOKEN = 4  # estimate for a text that is not tokenized yet, for a key's rate limit; settled afterwards
POLL_INTERVAL_S, POLL_TIMEOUT_S = 1.0, 2.0  # of replicas' stats
MAX_ANSWERED = 100_000  # requests that feedback can still be attributed to
UNAVAILABLE = (BackPressureError, DeploymentUnavailableError, RayActorError)

T = TypeVar("T")


class AnsweredRequest(NamedTuple):
    """A request that clients may give feedback on."""

    id: str
    model: str
    version: str
    key: str  # name of the API key


class RequestHandler:
    """The models behind an ingress, and what its routes do with every request."""

    def __init__(self, models: Router, settings: dict[str, Any], paths: set[str], own_socket: IngressSocket | None) -> None:  # fmt: skip
        """Take the models, the ingress' settings, the routes' paths, and the ingress' socket where it is one of several.

        Raises UserError for API keys that cannot be read.
        """
        self.models, self.paths, self.own_socket = models, paths, own_socket
        self.created = int(time.time())
        self.metrics = Metrics()
        self.rate_limiter = RateLimiter(own_socket.folder if own_socket else None)
        self.answered: dict[str, AnsweredRequest] = {}  # oldest first
        self._records_dir = ""
        self._polled_at, self._polling = 0.0, asyncio.Lock()
        self.apply_settings(settings)

    def apply_settings(self, settings: dict[str, Any]) -> None:
        """Use new settings from now on. Raises UserError for API keys that cannot be read; the old settings stay then."""
        options, access = settings["options"], access_options_from(settings["access"])
        self.access_control = AccessControl(access, self.metrics, self.paths, self.rate_limiter)
        if access.records_dir != self._records_dir:
            self._records_dir = access.records_dir
            self.record_writers = {
                kind: RecordWriter(Path(access.records_dir), kind) for kind in ("feedback", "requests")
            }
        self.access = access
        self.max_new_tokens, self.max_choices = options["max_new_tokens"], options["max_queue"]

    async def handle(
        self,
        request: Request,
        model: str | None,
        task: str | None,
        respond: Callable[[RequestContext], Awaitable[Response]],
    ) -> Response:
        """Find the model of a request and respond; the middleware counts the outcome. `task` None: a model of any task."""
        context = context_of(request)
        try:
            self.models.begin_request(await routing_key(request, context), trace_headers(context.span))
            context.model, context.adapter = await self._find_model(model, task)
            context.version = version_label(self.info(context), context.adapter)
            self._remember(context)
            response = await respond(context)
            answered_by = version_label(self.info(context), context.adapter)
            if context.version != answered_by:  # the canary failed, and the stable version answered
                context.version = answered_by
                self._remember(context)
            response.headers["x-manta-version"] = self.models.version(context.model).id
            return response
        except UNAVAILABLE as error:
            raise unavailable_error(error) from error

    def infos(self) -> dict[str, ModelInfo]:
        """Return the info of each model, of the version that the present request is routed to."""
        return {name: info for name in self.models if (info := self.models.model_info(name))}

    def info(self, context: RequestContext) -> ModelInfo:
        """Return the info of a request's model."""
        info = self.models.model_info(context.model)
        assert info
        return info

    async def ready_infos(self) -> dict[str, ModelInfo]:
        """Return the info of each model, asking replicas where need be. Raises ApiError while one does not answer."""
        name = ""
        try:
            for name in self.models:
                if not self.models.model_info(name):
                    await self.models.fetch_model_info(name)
        except (TimeoutError, *UNAVAILABLE) as error:
            raise ApiError(503, f"the model '{name}' is not ready: try again in some seconds") from error
        return self.infos()

    async def require_task(self, task: str, purpose: str) -> None:
        """Raise ApiError where no model has a task; `purpose` says what such a model does."""
        infos = await self.ready_infos()
        if all(info.task != task for info in infos.values()):
            served = ", ".join(f"{name} ({info.task})" for name, info in sorted(infos.items()))
            raise ApiError(404, f"no model here {purpose}; there are {served}", "model", "model_not_found")

    def check_num_choices(self, prompts: int, n: int, param: str) -> None:
        """Raise ApiError for a request with more choices than the queue has room for."""
        if prompts * n > self.max_choices:
            raise ApiError(
                400,
                f"{prompts} prompts x n {n} are over this endpoint's {self.max_choices} completions a request: send fewer",
                param,
            )

    def check_max_tokens(self, tokens: int, param: str) -> None:
        """Raise ApiError for more tokens than the endpoint generates for a choice."""
        if tokens > self.max_new_tokens:
            raise ApiError(400, f"{param} {tokens} is over this endpoint's {self.max_new_tokens}: use less", param)

    def check_token_ids(self, context: RequestContext, prompts: Sequence[Prompt], param: str) -> None:
        """Raise ApiError for a token id outside of the model's vocabulary."""
        largest = self.info(context).vocab_size - 1
        for prompt in prompts:
            if isinstance(prompt, list) and max(prompt) > largest:
                raise ApiError(400, f"token id {max(prompt)} is over the vocabulary's {largest}", param)

    def reserve_tokens(self, context: RequestContext, inputs: Sequence[Prompt], max_tokens: int) -> None:
        """Charge the request's key the most tokens that it may use, and keep its prompts if they are logged. Raises ApiError."""
        self.access_control.reserve_tokens(context, estimate_tokens(inputs) + max_tokens)
        if self.access.log_prompts:
            context.prompts = [text if isinstance(text, str) else str(text) for text in inputs]

    def record_usage(self, context: RequestContext, prompt: int, completion: int = 0, cached: int = 0) -> None:
        """Record the numbers of tokens that a request used."""
        context.prompt_tokens, context.completion_tokens = prompt, completion
        self.metrics.count_tokens(context.metric_labels, prompt=prompt, cached=cached, completion=completion)

    async def store_request(self, context: RequestContext, outputs: Sequence[dict[str, Any]]) -> None:
        """Store a request that may be kept, and its outputs, before its client has the last of them. Raises ApiError."""
        record = {
            "path": context.path, "input": json.dumps(json.loads(context.body)),
            "output": json.dumps(outputs), "seconds": context.elapsed_s,
        }  # fmt: skip
        await self.store("requests", AnsweredRequest(context.id, *context.metric_labels), record)

    async def store(self, kind: str, request: AnsweredRequest, record: dict[str, Any]) -> None:
        """Append a record about a request to those of its kind. Raises ApiError."""
        common = {"request": request.id, "time": datetime.now(UTC), "model": request.model, "version": request.version, "key": request.key}  # fmt: skip
        try:
            await self.record_writers[kind].write(common | record)
        except Exception as error:
            self.metrics.records.labels(kind).inc()
            raise ApiError(503, f"this could not be stored: {error}") from error

    def find_answered(self, request_id: str) -> AnsweredRequest | None:
        """Return the request that this ingress has answered, by its id or its response's id."""
        return self.answered.get(request_id) or self.answered.get(without_prefix(request_id))

    async def poll_replicas(self) -> None:
        """Update the stats of all replicas; those that don't answer in time are left out."""
        async with self._polling:
            if time.monotonic() < self._polled_at + POLL_INTERVAL_S:
                return
            names = list(self.models)
            stats = await asyncio.gather(*(self._replica_stats(name) for name in names))
            self.metrics.replica_stats = dict(zip(names, stats, strict=True))
            self._polled_at = time.monotonic()

    async def ingress_metrics(self) -> dict[int, list[Metric]] | None:
        """Return the metrics of each ingress by its number; None where there is one ingress only."""
        return dict(await self.broadcast("local_metrics")) if self.own_socket else None

    async def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call a method of each ingress, this one included; return the results that come in time."""
        handle = await asyncio.to_thread(serve.get_app_handle, serve.get_replica_context().app_name)
        responses = handle.broadcast(method, *args)
        results = await responses.results_async(timeout_s=POLL_TIMEOUT_S, return_exceptions=True)
        return [result for result in results if not isinstance(result, BaseException)]

    async def _replica_stats(self, name: str) -> list[dict[str, Any]]:
        try:
            results = await self.models.broadcast(name, "load_stats", POLL_TIMEOUT_S)
        except (TimeoutError, *UNAVAILABLE):  # no replica is up
            return []
        return [stats for stats in results if isinstance(stats, dict)]

    def _remember(self, context: RequestContext) -> None:
        """Keep what a request was answered by, for feedback on it."""
        self.answered[context.id] = AnsweredRequest(context.id, *context.metric_labels)
        if len(self.answered) > MAX_ANSWERED:
            del self.answered[next(iter(self.answered))]

    async def _find_model(self, model: str | None, task: str | None) -> tuple[str, str]:
        """Return the model and the adapter that a request names. Raises ApiError where there is none."""
        infos = await self.ready_infos()
        suitable = [name for name, info in infos.items() if task in (None, info.task)]
        if not model and len(suitable) != 1:
            raise ApiError(400, f"say which model: {', '.join(suitable) or 'none here does this'}", "model")
        requested, ids = model or suitable[0], model_ids(infos)
        if requested not in ids:
            message = f"model '{requested}' is not served here; there are {', '.join(sorted(ids))}"
            raise ApiError(404, message, "model", "model_not_found")
        name, adapter = ids[requested]
        if task not in (None, infos[name].task):
            raise ApiError(400, f"model '{requested}' does {infos[name].task}, not {task}", "model")
        return name, adapter


def handler_of(request: Request) -> RequestHandler:
    """Return the handler of the application that a request came to."""
    handler: RequestHandler = request.app.state.handler
    return handler


def context_of(request: Request) -> RequestContext:
    """Return the context that the middleware has made of a request."""
    context: RequestContext = request.state.context
    return context


async def routing_key(request: Request, context: RequestContext) -> str:
    """Return the key by which a request is routed to a version: its user, else its API key's name, else its id."""
    user = None
    if request.headers.get("content-type", "").startswith("application/json"):
        body = await request.json()
        user = body.get("user") if isinstance(body, dict) else None
    return str(user or context.key_name or context.id)


def unavailable_error(error: Exception) -> ApiError:
    """Return the response for a full queue or a lost replica; Serve replaces an app's own exception handlers for these."""
    if isinstance(error, BackPressureError):
        return ApiError(429, "too many requests wait: try again in a second")
    return ApiError(503, "the model's replica was lost and is being replaced: try again in some seconds")


def success(result: T | Failure, param: str | None = None) -> T:
    """Return a replica's result. Raises ApiError for a failure; `param` names the field at fault in the failure's place."""
    if isinstance(result, Failure):
        raise ApiError(result.status, result.message, param or result.param)
    return result


def estimate_tokens(inputs: Sequence[Prompt]) -> int:
    """Return the number of tokens of these inputs, estimated for texts."""
    return sum(-(-len(text) // CHARACTERS_PER_TOKEN) if isinstance(text, str) else len(text) for text in inputs)


def model_ids(infos: dict[str, ModelInfo]) -> dict[str, tuple[str, str]]:
    """Return (model, adapter) by the id that a client sends: of each model (adapter ""), and of each of its adapters."""
    adapters = {f"{name}:{adapter}": (name, adapter) for name, info in infos.items() for adapter in info.adapters}
    return adapters | {name: (name, "") for name in infos}


def version_label(info: ModelInfo, adapter: str) -> str:
    """Return the version in metrics and records: the beginning of the bundle's hash, and the adapter's name."""
    return f"{info.hash[:12]}:{adapter}" if adapter else info.hash[:12]


def without_prefix(response_id: str) -> str:
    """Return the request's id that a response's id holds."""
    for formatter in (ChatFormatter, CompletionFormatter):
        response_id = response_id.removeprefix(f"{formatter.id_prefix}-")
    return response_id

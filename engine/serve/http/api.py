"""The HTTP interface: OpenAI's paths and error bodies, on FastAPI. Each bundle is a model of its name."""

import asyncio
import base64
import contextlib
import json
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from engine.serve.http.errors import ApiError
from engine.serve.http.feedback_store import Recorder
from engine.serve.http.ingress_sockets import socket_dir, take_place
from engine.serve.http.middleware import AccessControl, Gate, RequestContext, access_from
from engine.serve.http.rate_limits import Limits
from engine.serve.http.responses import ChatForm, CompletionForm, Form, usage
from engine.serve.http.schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Feedback,
    Generation,
    ImageRequest,
    ScoreRequest,
)
from engine.serve.http.server import Server, listen
from engine.serve.http.static import POLICY, SWAGGER_CSS, SWAGGER_JS, page_files
from engine.serve.http.transcriptions import PATH as TRANSCRIPTIONS
from engine.serve.http.transcriptions import form_schema, response, uploaded
from engine.serve.metrics import Metric, Metrics
from engine.serve.routing.loopback import bind_to_loopback
from engine.serve.routing.router import Router
from engine.serve.tracing import FIRST_TOKEN, handed_on

MOST_INPUTS = 1024  # of one embeddings request
CHARACTERS_PER_TOKEN = 4  # of a text that is not tokenized yet, for a key's limit; what it was is settled afterwards
TABLE_TIMEOUT_S = 20.0
POLL_S, POLL_TIMEOUT_S = 1.0, 2.0  # how old replicas' figures may be, and how long they may take
REMEMBERED = 100_000  # requests whose model is known when feedback comes
REFUSALS = (BackPressureError, DeploymentUnavailableError, RayActorError)

app = FastAPI(title="Manta", description="Bundles behind OpenAI's interface.", docs_url=None, redoc_url=None)
app.add_middleware(Gate)


@app.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> Response:
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


@app.exception_handler(Exception)
async def _broken(request: Request, error: Exception) -> Response:
    return ApiError(500, f"{type(error).__name__}: this is the endpoint's fault, and in its log").response()


@app.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = [
        str(part)
        for part in first["loc"]
        if part != "body" and not str(part).startswith(("constrained", "list[", "str"))
    ]
    field = where[0] if where and first["type"] != "json_invalid" else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: this endpoint has no such option: leave it out", field).response()
    return ApiError(400, f"{field or 'the body'}: {first['msg']}", field).response()


# Serve copies the class where it is decorated, so what its methods call stands above it.
async def _who(request: Request, visit: RequestContext) -> str:
    """Return whom a request is from, as far as it says so: its user, else its key's name, else nobody known."""
    user = None
    if request.headers.get("content-type", "").startswith("application/json"):
        body = await request.json()
        user = body.get("user") if isinstance(body, dict) else None
    return str(user or visit.key_name or visit.id)


def _refusal(error: Exception) -> ApiError:
    """Turn what Serve raises for a full queue or a lost replica into an answer; an app's handlers of these it replaces."""
    if isinstance(error, BackPressureError):
        return ApiError(429, "too many requests wait: try again in a second")
    return ApiError(503, "the model's replica was lost and is being replaced: try again in some seconds")


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Return a replica's answer. Raises ApiError where it refuses."""
    if "error" in answer:
        raise ApiError(answer["status"], answer["error"], answer["param"])
    return answer


def _base64(numbers: list[float]) -> str:
    """Return little-endian float32s in base64."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _tokens(inputs: Sequence[str | list[int]]) -> int:
    """Return how many tokens these are: about, where they are texts."""
    return sum(-(-len(it) // CHARACTERS_PER_TOKEN) if isinstance(it, str) else len(it) for it in inputs)


def _ids(about: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return (model, adapter) by what a client asks for: each model, and each of its adapters; "": none."""
    found = {f"{name}:{adapter}": (name, adapter) for name, it in about.items() for adapter in it.get("adapters", ())}
    return found | {name: (name, "") for name in about}


def _version(about: dict[str, Any], adapter: str) -> str:
    """Return what metrics and records call a version: the beginning of its bundle's hash, and an adapter's name."""
    return f"{about['hash'][:12]}:{adapter}" if adapter else about["hash"][:12]


def _told(request_id: str) -> str:
    """Return the request's id that an answer's id holds."""
    for prefix in (ChatForm.prefix, CompletionForm.prefix):
        request_id = request_id.removeprefix(f"{prefix}-")
    return request_id


@serve.ingress(app)
class Api:
    """The ingress: checks requests, hands them to the bundles' replicas, and counts."""

    def __init__(self, steward: str, settings: dict[str, Any], listens: bool) -> None:
        """Take the steward's application, and the options of ServeConfig and Access; `listens`: without Serve's proxy.

        Raises UserError for unreadable keys, and an address that it cannot listen on.
        """
        bind_to_loopback()
        self.bundles = Router(steward, settings, self._change)
        self.created = int(time.time())
        self.counts = Metrics()
        self.paths = {"/", "/docs", *app.openapi()["paths"]}
        self.pages = page_files()
        options = settings["options"]
        self.place = take_place(socket_dir(), options["ingresses"]) if options["haproxy"] else None
        self.limits, self.records_dir = Limits(self.place.folder if self.place else None), ""
        self._change(settings)
        self.front: Server | None = None
        if listens:
            taken = self.place.listen() if self.place else listen(options["host"], options["port"])
            self.opening = asyncio.get_running_loop().create_task(self._open(taken))
        self.answered: dict[str, tuple[str, str, str]] = {}  # request -> model, version, key; the eldest first
        self.polled_at = 0.0
        self.polling = asyncio.Lock()

    def _change(self, settings: dict[str, Any]) -> None:
        """Go by these settings from now on. Raises UserError for unreadable keys, and goes by the old ones."""
        options, access = settings["options"], access_from(settings["access"])
        Gate.door = self.door = AccessControl(access, self.counts, self.paths, self.limits)
        if access.records_dir != self.records_dir:
            self.records_dir = access.records_dir
            self.recorders = {kind: Recorder(Path(self.records_dir), kind) for kind in ("feedback", "requests")}
        self.access = access
        self.max_new_tokens, self.max_sequences = options["max_new_tokens"], options["max_queue"]

    async def _open(self, taken: socket.socket) -> None:
        """Take requests, once there is a table and Serve knows this object, by which its methods are called."""
        await self.check_health()
        while serve.get_replica_context().servable_object is not self:
            await asyncio.sleep(0.01)
        self.front = Server(self.app, taken)  # type: ignore[attr-defined]  # of Serve's own class around this one

    async def __del__(self) -> None:
        """Answer what has come before the process ends: Serve awaits this."""
        if self.front:
            await self.front.close()

    async def check_health(self) -> None:
        """Wait for the first table: an ingress that knows no model yet gets no request."""
        with contextlib.suppress(TimeoutError):  # the steward may be away for longer: no reason to begin anew
            await asyncio.wait_for(self.bundles.informed.wait(), TABLE_TIMEOUT_S)

    async def table(self) -> int:
        """Return the number of the steward's table that this ingress goes by."""
        return self.bundles.number

    @property
    def about(self) -> dict[str, dict[str, Any]]:
        """What each model says of itself: of the version that the present request falls to."""
        return {name: about for name in self.bundles.models if (about := self.bundles.about(name))}

    async def _ready(self) -> dict[str, dict[str, Any]]:
        """Return what the bundles are. Raises ApiError while one has told nobody yet."""
        try:
            for name in self.bundles:
                if not self.bundles.about(name):
                    await self.bundles.ask(name)
        except (TimeoutError, *REFUSALS) as error:
            raise ApiError(503, f"the model '{name}' is not ready: try again in some seconds") from error
        return self.about

    @app.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """Return the page on which the models can be tried."""
        return HTMLResponse(self.pages["index.html"][0], headers=POLICY)

    @app.get("/page/{name}", include_in_schema=False)
    async def part_of_a_page(self, name: str) -> Response:
        """Return a file that a page asks for."""
        if name not in self.pages:
            raise ApiError(404, f"there is no {name} here")
        content, kind = self.pages[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "max-age=3600"})

    @app.get("/docs", include_in_schema=False)
    async def docs(self) -> Response:
        """Return Swagger's page of this interface."""
        return get_swagger_ui_html(
            openapi_url="/openapi.json", title="Manta", swagger_js_url=f"/page/{SWAGGER_JS}",
            swagger_css_url=f"/page/{SWAGGER_CSS}", swagger_favicon_url="data:,",
        )  # fmt: skip

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Tell that the ingress lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(self) -> Response:
        """Answer 200 while every bundle takes traffic, else 503."""
        try:
            await asyncio.gather(*(self.bundles.ask(name) for name in self.bundles))
            status = "ready" if self.about else "starting"
            body, table = {"status": status, "models": sorted(self.about)}, {"x-manta-table": str(self.bundles.number)}
            return JSONResponse(body, 200 if self.about else 503, table)
        except (TimeoutError, RuntimeError, RayActorError) as error:
            return JSONResponse({"status": "starting", "reason": str(error)[:200]}, 503)

    @app.get("/metrics")
    async def metrics(self) -> Response:
        """Return Prometheus metrics, of the replicas too."""
        await self._poll()
        ingresses = dict(await self._of_each_ingress("counted")) if self.place else None
        return PlainTextResponse(self.counts.page(ingresses), media_type="text/plain; version=0.0.4")

    async def counted(self) -> tuple[int, list[Metric]]:
        """Return what this ingress, of several, has counted, with its number."""
        assert self.place
        return self.place.number, self.counts.own()

    async def _of_each_ingress(self, method: str, *words: Any) -> list[Any]:
        """Return what each ingress answers, this one too; those that don't in time are left out."""
        handle = await asyncio.to_thread(serve.get_app_handle, serve.get_replica_context().app_name)
        asked = handle.broadcast(method, *words)
        found = await asked.results_async(timeout_s=POLL_TIMEOUT_S, return_exceptions=True)
        return [it for it in found if not isinstance(it, BaseException)]

    async def _poll(self) -> None:
        """Ask all replicas how they are; those that don't answer in time are not told of."""
        async with self.polling:
            if time.monotonic() < self.polled_at + POLL_S:
                return
            names = list(self.bundles)
            found = await asyncio.gather(*(self._figures(name) for name in names))
            self.counts.replicas = dict(zip(names, found, strict=True))
            self.polled_at = time.monotonic()

    async def _figures(self, name: str) -> list[dict[str, Any]]:
        try:
            found = await self.bundles.of_each_replica(name, "figures", POLL_TIMEOUT_S)
        except (TimeoutError, *REFUSALS):  # none is there
            return []
        return [it for it in found if isinstance(it, dict)]

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """List the bundles, and their adapters."""
        about = await self._ready()
        listed = []
        for asked, (name, adapter) in sorted(_ids(about).items()):
            it = about[name]
            one = {"id": asked, "object": "model", "created": self.created, "owned_by": "manta", "task": it["task"]}
            own = {"hash": it["adapters"][adapter], "parent": name} if adapter else {"hash": it["hash"]}
            listed.append(one | own | ({} if adapter else self.bundles.standing(name)))
        return {"object": "list", "data": listed}

    @app.get("/v1/replicas")
    async def replicas(self) -> dict[str, Any]:
        """List the replicas that answer: whose, which version, how busy."""
        await self._poll()
        listed = [{"model": name, **it} for name, said in self.counts.replicas.items() for it in said]
        return {"object": "list", "data": listed}

    @app.post("/v1/classify")
    async def classify(self, request: Request, body: ClassifyRequest) -> Response:
        """Name the class of each text: {"id", "model", "data": [{"index", "label", "scores"}], "usage"}."""

        async def answer(name: str, visit: RequestContext) -> Response:
            texts = body.texts()
            self._charge(visit, texts, 0)
            found = await self.bundles[name].classify.remote(texts)
            self._spend(visit, sum(it["tokens"] for it in found))
            data = [{"index": i, "label": it["label"], "scores": it["scores"]} for i, it in enumerate(found)]
            if body.store:
                await self._record(visit, data)
            spent = {"prompt_tokens": visit.read, "total_tokens": visit.read}
            return JSONResponse({"id": visit.id, "model": name, "data": data, "usage": spent})

        return await self._answer(request, body.model, "classification", answer)

    @app.post("/v1/embeddings")
    async def embeddings(self, request: Request, body: EmbeddingRequest) -> Response:
        """Embed each input: the mean of the model's last hidden states, of length 1."""

        async def answer(name: str, visit: RequestContext) -> Response:
            vectors = await self._embed(name, visit, body.inputs(), "input")
            encoded = [_base64(it) if body.encoding_format == "base64" else it for it in vectors]
            data = [{"object": "embedding", "index": i, "embedding": it} for i, it in enumerate(encoded)]
            spent = {"prompt_tokens": visit.read, "total_tokens": visit.read}
            return JSONResponse({"object": "list", "model": name, "data": data, "usage": spent})

        return await self._answer(request, body.model, None, answer)

    @app.post("/v1/score")
    async def score(self, request: Request, body: ScoreRequest) -> Response:
        """Tell how alike the texts of each pair are, from -1 to 1: the cosine between their embeddings."""

        async def answer(name: str, visit: RequestContext) -> Response:
            pairs = body.pairs()
            rows = {text: row for row, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
            vectors = np.array(await self._embed(name, visit, list(rows), "text_2"))
            first, second = (vectors[[rows[pair[side]] for pair in pairs]] for side in (0, 1))
            cosines: list[float] = (first * second).sum(1).tolist()
            data = [{"object": "score", "index": i, "score": it} for i, it in enumerate(cosines)]
            spent = {"prompt_tokens": visit.read, "total_tokens": visit.read}
            return JSONResponse({"id": visit.id, "object": "list", "model": name, "data": data, "usage": spent})

        return await self._answer(request, body.model, None, answer)

    @app.post("/v1/completions")
    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """Continue each prompt, as OpenAI's completions do; with `stream`, by server-sent events."""

        async def answer(name: str, visit: RequestContext) -> Response:
            self._check_length(body.max_tokens, "max_tokens")
            prompts = body.prompts()
            self._check_count(len(prompts), body.n, "prompt")
            self._check_tokens(name, prompts, "prompt")
            self._charge(visit, prompts, len(prompts) * body.n * body.max_tokens)
            return await self._generate(name, visit, body, CompletionForm())

        return await self._answer(request, body.model, "completion", answer)

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a chat's last message, as OpenAI's chat completions do; with `stream`, by server-sent events."""

        async def answer(name: str, visit: RequestContext) -> Response:
            self._check_length(
                body.most_tokens or 1, "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
            )
            self._check_count(1, body.n, "n")
            texts = [message.plain()["content"] for message in body.messages]
            self._charge(visit, texts, body.n * (body.most_tokens or self.max_new_tokens))
            return await self._generate(name, visit, body, ChatForm())

        return await self._answer(request, body.model, "completion", answer)

    @app.post(TRANSCRIPTIONS, openapi_extra=form_schema())
    async def transcriptions(self, request: Request) -> Response:
        """Write down what is said in an audio file, sent as a form (multipart/form-data), as OpenAI's transcriptions are."""
        body, content = await uploaded(request)
        await self._need("transcription", "hears speech")

        async def answer(name: str, visit: RequestContext) -> Response:
            about = self.about[name]
            self.door.reserve(visit, about["heard"] + about["positions"])
            job = {"temperature": body.temperature, "language": body.language, "judged": body.response_format == "verbose_json"}  # fmt: skip
            found = _checked(await self.bundles[name].transcribe.remote(content, job))
            self._spend(visit, found["read"], found["written"])
            return response(body, found)

        return await self._answer(request, body.model, "transcription", answer)

    @app.post("/v1/feedback")
    async def feedback(self, request: Request, body: Feedback) -> Response:
        """Keep what somebody thinks of an answer; of several for one request, the last holds."""
        visit: RequestContext = request.state.visit
        known = await self.whose(body.request)
        if known is None and self.place:
            known = next((it for it in await self._of_each_ingress("whose", body.request) if it), None)
        asked, (model, version, key) = known or (_told(body.request), ("", "", visit.key_name))
        if key != visit.key_name:
            raise ApiError(404, f"this key has asked no request {body.request}", "request")
        rating = {"up": 1, "down": -1, None: None}[body.rating]
        said = {"rating": rating, "label": body.label, "text": body.text, "comment": body.comment}
        await self._write("feedback", self._whose(asked, model, version, key) | said)
        if body.rating:
            self.counts.feedback.labels(model, version, body.rating).inc()
            self.bundles.rated(model, version, body.rating == "down")
        return JSONResponse({"object": "feedback", "request": asked, "model": model or None, "stored": True})

    async def whose(self, request: str) -> tuple[str, tuple[str, str, str]] | None:
        """Return (id, (model, version, key)) of a request that this ingress has answered, by its id or its answer's."""
        asked = request if request in self.answered else _told(request)
        return (asked, self.answered[asked]) if asked in self.answered else None

    @app.post("/v1/images/generations")
    async def images(self, request: Request, body: ImageRequest) -> Response:
        """Make images of what the prompt names: {"created", "data": [{"b64_json": a PNG file}], "seed", "usage"}.

        Image i is that of `seed` + i; without one, the seed that was drawn is told.
        """
        await self._need("images", "makes images")

        async def answer(name: str, visit: RequestContext) -> Response:
            image = self.about[name]["image"]
            size = f"{image['side']}x{image['side']}"
            if body.size not in (None, "auto", size):
                raise ApiError(400, f"model '{name}' makes images of {size}, not {body.size}: leave size out", "size")
            self._charge(visit, [body.prompt], body.n * image["tokens"])
            seed = secrets.randbits(53) if body.seed is None else body.seed  # which JSON numbers hold exactly
            found = await self.bundles[name].draw.remote(body.prompt, [seed + i for i in range(body.n)])
            _checked(found[0])
            self._spend(visit, body.n, body.n * image["tokens"])
            spent = {
                "input_tokens": visit.read, "output_tokens": visit.written, "total_tokens": visit.read + visit.written,
                "input_tokens_details": {"text_tokens": visit.read, "image_tokens": 0},
            }  # fmt: skip
            told = {"id": visit.id, "created": int(time.time()), "model": name, "seed": seed, "size": size, "output_format": "png"}  # fmt: skip
            return JSONResponse(told | {"data": [{"b64_json": it["image"]} for it in found], "usage": spent})

        return await self._answer(request, body.model, "images", answer)

    async def _need(self, task: str, what: str) -> None:
        """Raise ApiError where no model here is for a task; `what` it does."""
        about = await self._ready()
        if all(it["task"] != task for it in about.values()):
            there = ", ".join(f"{name} ({it['task']})" for name, it in sorted(about.items()))
            raise ApiError(404, f"no model here {what}; there are {there}", "model", "model_not_found")

    async def _embed(
        self, name: str, visit: RequestContext, inputs: Sequence[str | list[int]], param: str
    ) -> list[list[float]]:
        """Return the embedding of each input, of length 1. Raises ApiError for what the model can't embed."""
        if visit.adapter:
            raise ApiError(400, f"adapters write, and '{name}' embeds without them: ask for model '{name}'", "model")
        if not self.about[name]["embeds"]:
            raise ApiError(400, f"model '{name}' does {self.about[name]['task']}, it embeds no texts", "model")
        if len(inputs) > MOST_INPUTS:
            raise ApiError(400, f"{len(inputs)} inputs are over this endpoint's {MOST_INPUTS}: send fewer", param)
        self._check_tokens(name, inputs, param)
        self._charge(visit, inputs, 0)
        found = await self.bundles[name].embed.remote(list(inputs))
        _checked(found[0] | {"param": param})
        self._spend(visit, sum(it["tokens"] for it in found))
        return [it["embedding"] for it in found]

    def _check_length(self, tokens: int, param: str) -> None:
        if tokens > self.max_new_tokens:
            raise ApiError(400, f"{param} {tokens} is over this endpoint's {self.max_new_tokens}: use less", param)

    def _check_count(self, prompts: int, n: int, param: str) -> None:
        if prompts * n > self.max_sequences:
            raise ApiError(
                400,
                f"{prompts} prompts x n {n} are over this endpoint's {self.max_sequences} completions a request: send fewer",
                param,
            )

    def _check_tokens(self, name: str, prompts: Sequence[str | list[int]], param: str) -> None:
        """Raise ApiError for a token id that the model doesn't know."""
        most = self.about[name]["vocabulary"] - 1
        for prompt in prompts:
            if isinstance(prompt, list) and max(prompt) > most:
                raise ApiError(400, f"token id {max(prompt)} is over the vocabulary's {most}", param)

    def _charge(self, visit: RequestContext, inputs: Sequence[str | list[int]], written: int) -> None:
        """Charge the visit's key what it may come to use, and keep its prompts if they are logged. Raises ApiError."""
        self.door.reserve(visit, _tokens(inputs) + written)
        if self.access.log_prompts:
            visit.prompts = [it if isinstance(it, str) else str(it) for it in inputs]

    def _spend(self, visit: RequestContext, read: int, written: int = 0, cached: int = 0) -> None:
        """Note the tokens that a visit used."""
        visit.read, visit.written = read, written
        for kind, count in (("prompt", read), ("cached", cached), ("completion", written)):
            self.counts.tokens.labels(*visit.who, kind).inc(count)

    def _observe(self, visit: RequestContext, times: dict[str, float] | None) -> None:
        """Note how long a completion took."""
        for what, took in (times or {}).items():
            self.counts.times[what].labels(*visit.who).observe(took)

    async def _generate(self, name: str, visit: RequestContext, body: Generation, form: Form) -> Response:
        """Have a replica do a job, and give its answer in a form."""
        job = body.job() | {"adapter": visit.adapter}
        self._check_tokens(name, [list(job["sampling"]["bias"])] if job["sampling"]["bias"] else [], "logit_bias")
        if visit.key:
            job["client"] = f"{visit.key.name} {job['client']}"
        about = {"id": f"{form.prefix}-{visit.id}", "created": int(time.time()), "model": visit.asked}
        if body.stream:
            stream = self.bundles[name].options(stream=True).stream.remote(job)
            head = _checked(await anext(stream))["head"]
            events = self._events(about | {"object": form.part}, visit, body, form, head, stream)
            return StreamingResponse(events, media_type="text/event-stream")
        done = _checked(await self.bundles[name].complete.remote(job))
        texts = done["head"]["texts"] or [""] * len(done["choices"])
        choices = [form.choice(choice, text) for choice, text in zip(done["choices"], texts, strict=True)]
        spent = self._end(visit, done["head"], done["choices"])
        if body.store:
            await self._record(visit, [{"text": it["text"], "reason": it["reason"]} for it in done["choices"]])
        return JSONResponse(about | {"object": form.whole, "choices": choices, "usage": spent})

    def _end(self, visit: RequestContext, head: dict[str, Any], last: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Note what a request's completions used and took, by the last event of each; return the usage."""
        written = sum(event["tokens"] for event in last)
        self._spend(visit, head["prompt_tokens"], written, head["cached_tokens"])
        for event in last:
            self._observe(visit, event["times"])
        return usage(head, written)

    async def _events(
        self,
        about: dict[str, Any],
        visit: RequestContext,
        body: Generation,
        form: Form,
        head: dict[str, Any],
        stream: Any,
    ) -> AsyncIterator[str]:
        """Yield server-sent events of all choices as they come, and [DONE]."""
        last: dict[int, dict[str, Any]] = {}
        written: dict[int, list[str]] = {}
        texts = dict(enumerate(head["texts"]))
        ended, spent = False, None
        try:
            async for message in stream:
                for event in _checked(message)["events"]:
                    if not last:
                        visit.span.add_event(FIRST_TOKEN)
                    index = event["index"]
                    choice = form.delta(event, texts.pop(index, ""), index not in last)
                    last[index] = event
                    if body.store:
                        written.setdefault(index, []).append(event["text"])
                    yield _event(about | {"choices": [choice]})
            ended = True
            spent = self._end(visit, head, list(last.values()))
            if body.store:
                kept = [{"text": "".join(written[i]), "reason": last[i]["reason"]} for i in sorted(last)]
                await self._record(visit, kept)
            if body.stream_options and body.stream_options.include_usage:
                yield _event(about | {"choices": [], "usage": spent})
        except ApiError as error:
            ended = visit.failed = True
            yield _event(error.body())
        except (*REFUSALS, RayTaskError) as error:  # the replica died
            ended = visit.failed = True
            yield _event(ApiError(500, f"{type(error).__name__}: the replica was lost").body())
        finally:
            if not ended:  # the client has hung up
                stream.cancel()
            if spent is None:
                self._end(visit, head, list(last.values()))
        yield "data: [DONE]\n\n"

    def _whose(self, request: str, model: str, version: str, key: str) -> dict[str, Any]:
        return {"request": request, "time": datetime.now(UTC), "model": model, "version": version, "key": key}

    async def _record(self, visit: RequestContext, answers: Sequence[dict[str, Any]]) -> None:
        """Keep a request that may be kept, and its answers, before the client has the last of them. Raises ApiError."""
        own = {
            "path": visit.path, "input": json.dumps(json.loads(visit.body)),
            "output": json.dumps(answers), "seconds": visit.seconds,
        }  # fmt: skip
        await self._write("requests", self._whose(visit.id, visit.model, visit.version, visit.key_name) | own)

    async def _write(self, kind: str, record: dict[str, Any]) -> None:
        try:
            await self.recorders[kind].write(record)
        except Exception as error:
            self.counts.records.labels(kind).inc()
            raise ApiError(503, f"this could not be kept: {error}") from error

    async def _answer(
        self,
        request: Request,
        model: str | None,
        task: str | None,
        answer: Callable[[str, RequestContext], Awaitable[Response]],
    ) -> Response:
        """Find the model, and answer; what became of it, the gate counts."""
        visit: RequestContext = request.state.visit
        try:
            self.bundles.begin(await _who(request, visit), handed_on(visit.span))
            visit.model, visit.adapter = await self._model(model, task)
            visit.version = _version(self.about[visit.model], visit.adapter)
            self._remember(visit)
            response = await answer(visit.model, visit)
            answered = _version(self.about[visit.model], visit.adapter)
            if visit.version != answered:  # the one on trial could not
                visit.version = answered
                self._remember(visit)
            response.headers["x-manta-version"] = self.bundles.version(visit.model)["id"]
            return response
        except REFUSALS as error:
            raise _refusal(error) from error

    def _remember(self, visit: RequestContext) -> None:
        """Keep whose a request is, for feedback on it."""
        self.answered[visit.id] = visit.who
        if len(self.answered) > REMEMBERED:
            del self.answered[next(iter(self.answered))]

    async def _model(self, model: str | None, task: str | None) -> tuple[str, str]:
        """Return the model and the adapter that a request means; `task` None: of any. Raises ApiError where there is none."""
        about = await self._ready()
        fitting = [known for known, it in about.items() if task in (None, it["task"])]
        if not model and len(fitting) != 1:
            raise ApiError(400, f"say which model: {', '.join(fitting) or 'none here does this'}", "model")
        asked, there = model or fitting[0], _ids(about)
        if asked not in there:
            told = f"model '{asked}' is not served here; there are {', '.join(sorted(there))}"
            raise ApiError(404, told, "model", "model_not_found")
        name, adapter = there[asked]
        if task not in (None, about[name]["task"]):
            raise ApiError(400, f"model '{asked}' does {about[name]['task']}, not {task}", "model")
        return name, adapter

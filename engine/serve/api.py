"""The HTTP interface: OpenAI's paths and error bodies, on FastAPI. Each bundle is a model of its name."""

import asyncio
import base64
import json
import struct
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from engine.serve.answers import ChatForm, CompletionForm, Form, usage
from engine.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest, Generation
from engine.serve.router import Router

TYPES = {400: "invalid_request_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}
MOST_INPUTS = 1024  # of one embeddings request
REFUSALS = (BackPressureError, DeploymentUnavailableError, RayActorError)


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error body."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return it as a response."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


class BodyLimit:
    """ASGI middleware: answers 413 to a body over the limit without reading it to its end."""

    limit = 2**20  # bytes; the ingress sets it to serve.max_body_bytes

    def __init__(self, app: Any) -> None:
        self.inner = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, counting its body's bytes."""
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", int(declared) <= self.limit
        while more and len(body) <= self.limit:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if int(declared) > self.limit or len(body) > self.limit:
            await ApiError(413, f"the request is over {self.limit:,} bytes: send less").response()(scope, receive, send)
            return
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        await self.inner(scope, again, send)


app = FastAPI(title="Manta", description="Bundles behind OpenAI's interface.")
app.add_middleware(BodyLimit)


@app.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> Response:
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


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
async def _counted(events: AsyncIterable[Any], count: Callable[[int], None]) -> AsyncIterator[Any]:
    """Pass a stream on, and count it at its end: 200, 500 if it told an error, 499 if the client left before."""
    status = 499
    failed = False
    try:
        async for event in events:
            failed = failed or str(event).startswith('data: {"error"')
            yield event
        status = 500 if failed else 200
    finally:
        count(status)


async def _who(request: Request) -> str:
    """Return whom a request is from, as far as it says so: its user, else its key, else its id, else nobody known."""
    user = None
    if request.headers.get("content-type", "").startswith("application/json"):
        body = await request.json()
        user = body.get("user") if isinstance(body, dict) else None
    headers = request.headers
    return str(user or headers.get("authorization") or headers.get("x-request-id") or uuid.uuid4().hex)


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


@serve.ingress(app)
class Api:
    """The ingress: checks requests, hands them to the bundles' replicas, and counts."""

    def __init__(self, steward: str, max_body_bytes: int, max_new_tokens: int, max_sequences: int, tries: int) -> None:
        """Take the steward's application; `max_sequences`: most completions in one request; `tries`: see `Router`."""
        self.bundles, self.max_new_tokens, self.max_sequences = Router(steward, tries), max_new_tokens, max_sequences
        BodyLimit.limit = max_body_bytes
        self.created = int(time.time())
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "manta_requests", "requests answered", ["path", "model", "status"], registry=self.registry
        )
        self.tokens = Counter("manta_tokens", "tokens read and written", ["model", "kind"], registry=self.registry)
        self.seconds = Histogram(
            "manta_request_seconds", "time to the whole answer", ["path", "model"], registry=self.registry
        )

    @property
    def about(self) -> dict[str, dict[str, Any]]:
        """What each model says of itself: of the version that the present request falls to."""
        return {name: about for name in self.bundles.models if (about := self.bundles.about(name))}

    async def _ready(self) -> dict[str, dict[str, Any]]:
        for name in self.bundles.models:
            if not self.bundles.about(name):
                await self.bundles.ask(name)
        return self.about

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Tell that the ingress lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(self) -> Response:
        """Answer 200 while every bundle takes traffic, else 503."""
        try:
            await asyncio.gather(*(self.bundles.ask(name) for name in self.bundles.models))
            status = "ready" if self.about else "starting"
            body, table = {"status": status, "models": sorted(self.about)}, {"x-manta-table": str(self.bundles.number)}
            return JSONResponse(body, 200 if self.about else 503, table)
        except (TimeoutError, RuntimeError, RayActorError) as error:
            return JSONResponse({"status": "starting", "reason": str(error)[:200]}, 503)

    @app.get("/metrics")
    async def metrics(self) -> Response:
        """Return Prometheus metrics."""
        return PlainTextResponse(generate_latest(self.registry).decode(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """List the bundles."""
        about = await self._ready()
        listed = [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "manta",
                "task": it["task"],
                "hash": it["hash"],
                **self.bundles.standing(name),
            }
            for name, it in about.items()
        ]
        return {"object": "list", "data": listed}

    @app.post("/v1/classify")
    async def classify(self, request: Request, body: ClassifyRequest) -> Response:
        """Name the class of each text: {"model", "data": [{"index", "label", "scores"}], "usage"}."""

        async def answer(name: str) -> Response:
            texts = [body.input] if isinstance(body.input, str) else body.input
            found = await self.bundles[name].classify.remote(texts)
            tokens = sum(it["tokens"] for it in found)
            self.tokens.labels(name, "prompt").inc(tokens)
            data = [{"index": i, "label": it["label"], "scores": it["scores"]} for i, it in enumerate(found)]
            return JSONResponse(
                {"model": name, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
            )

        return await self._answer(request, body.model, "classification", answer)

    @app.post("/v1/embeddings")
    async def embeddings(self, request: Request, body: EmbeddingRequest) -> Response:
        """Embed each input: the mean of the model's last hidden states, of length 1."""

        async def answer(name: str) -> Response:
            inputs = body.inputs()
            if not self.about[name]["embeds"]:
                raise ApiError(400, f"model '{name}' does {self.about[name]['task']}, it embeds no texts", "model")
            if len(inputs) > MOST_INPUTS:
                raise ApiError(400, f"{len(inputs)} inputs are over this endpoint's {MOST_INPUTS}: send fewer", "input")
            self._check_tokens(name, inputs, "input")
            found = await self.bundles[name].embed.remote(inputs)
            _checked(found[0])
            tokens = sum(it["tokens"] for it in found)
            self.tokens.labels(name, "prompt").inc(tokens)
            encoded = [
                _base64(it["embedding"]) if body.encoding_format == "base64" else it["embedding"] for it in found
            ]
            data = [{"object": "embedding", "index": i, "embedding": it} for i, it in enumerate(encoded)]
            return JSONResponse(
                {
                    "object": "list",
                    "model": name,
                    "data": data,
                    "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                }
            )

        return await self._answer(request, body.model, None, answer)

    @app.post("/v1/completions")
    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """Continue each prompt, as OpenAI's completions do; with `stream`, by server-sent events."""

        async def answer(name: str) -> Response:
            self._check_length(body.max_tokens, "max_tokens")
            prompts = body.prompts()
            self._check_count(len(prompts), body.n, "prompt")
            self._check_tokens(name, prompts, "prompt")
            return await self._generate(name, body, CompletionForm())

        return await self._answer(request, body.model, "completion", answer)

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a chat's last message, as OpenAI's chat completions do; with `stream`, by server-sent events."""

        async def answer(name: str) -> Response:
            self._check_length(
                body.most_tokens or 1, "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
            )
            self._check_count(1, body.n, "n")
            return await self._generate(name, body, ChatForm())

        return await self._answer(request, body.model, "completion", answer)

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

    def _check_tokens(self, name: str, prompts: list[str | list[int]], param: str) -> None:
        """Raise ApiError for a token id that the model doesn't know."""
        most = self.about[name]["vocabulary"] - 1
        for prompt in prompts:
            if isinstance(prompt, list) and max(prompt) > most:
                raise ApiError(400, f"token id {max(prompt)} is over the vocabulary's {most}", param)

    async def _generate(self, name: str, body: Generation, form: Form) -> Response:
        """Have a replica do a job, and give its answer in a form."""
        job = body.job()
        self._check_tokens(name, [list(job["sampling"]["bias"])] if job["sampling"]["bias"] else [], "logit_bias")
        about = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            stream = self.bundles[name].options(stream=True).stream.remote(job)
            head = _checked(await anext(stream))["head"]
            usage_too = bool(body.stream_options and body.stream_options.include_usage)
            events = self._events(name, about | {"object": form.part}, form, head, stream, usage_too)
            return StreamingResponse(events, media_type="text/event-stream")
        done = _checked(await self.bundles[name].complete.remote(job))
        texts = done["head"]["texts"] or [""] * len(done["choices"])
        choices = [form.choice(choice, text) for choice, text in zip(done["choices"], texts, strict=True)]
        spent = self._usage(name, done["head"], sum(choice["tokens"] for choice in done["choices"]))
        return JSONResponse(about | {"object": form.whole, "choices": choices, "usage": spent})

    async def _events(
        self, name: str, about: dict[str, Any], form: Form, head: dict[str, Any], stream: Any, usage_too: bool
    ) -> AsyncIterator[str]:
        """Yield server-sent events of all choices as they come, and [DONE]."""
        tokens: dict[int, int] = {}
        texts = dict(enumerate(head["texts"]))
        ended = False
        try:
            async for message in stream:
                for event in _checked(message)["events"]:
                    index = event["index"]
                    choice = form.delta(event, texts.pop(index, ""), index not in tokens)
                    tokens[index] = event["tokens"]
                    yield _event(about | {"choices": [choice]})
            ended = True
            spent = self._usage(name, head, sum(tokens.values()))
            if usage_too:
                yield _event(about | {"choices": [], "usage": spent})
        except ApiError as error:
            ended = True
            yield _event(error.body())
        except (*REFUSALS, RayTaskError) as error:  # the replica died
            ended = True
            yield _event(ApiError(500, f"{type(error).__name__}: the replica was lost").body())
        finally:
            if not ended:  # the client has hung up
                stream.cancel()
        yield "data: [DONE]\n\n"

    def _usage(self, name: str, head: dict[str, Any], written: int) -> dict[str, Any]:
        self.tokens.labels(name, "prompt").inc(head["prompt_tokens"])
        self.tokens.labels(name, "completion").inc(written)
        return usage(head, written)

    async def _answer(
        self, request: Request, model: str | None, task: str | None, answer: Callable[[str], Awaitable[Response]]
    ) -> Response:
        """Find the model, answer, and count what became of it."""
        began, path, status, name = time.perf_counter(), request.url.path, 500, model or ""

        def count(ended: int) -> None:
            known = name if name in self.about else ""
            self.requests.labels(path, known, ended).inc()
            self.seconds.labels(path, known).observe(time.perf_counter() - began)

        try:
            self.bundles.begin(await _who(request))
            name = await self._model(model, task)
            response = await answer(name)
            response.headers["x-manta-version"] = self.bundles.version(name)["id"]
        except (ApiError, *REFUSALS) as error:
            told = error if isinstance(error, ApiError) else _refusal(error)
            status = told.status
            raise told from error
        except asyncio.CancelledError:  # the client has hung up
            status = 499
            raise
        else:
            if isinstance(response, StreamingResponse):
                response.body_iterator = _counted(response.body_iterator, count)
                status = 0  # counted at its end
            else:
                status = response.status_code
            return response
        finally:
            if status:
                count(status)

    async def _model(self, model: str | None, task: str | None) -> str:
        """Return the name of the model that a request means; `task` None: of any. Raises ApiError where there is none."""
        about = await self._ready()
        fitting = [known for known, it in about.items() if task in (None, it["task"])]
        if model is None and len(fitting) != 1:
            raise ApiError(400, f"say which model: {', '.join(fitting) or 'none here does this'}", "model")
        name = model or fitting[0]
        if name not in about:
            there = ", ".join(sorted(about))
            raise ApiError(404, f"model '{name}' is not served here; there are {there}", "model", "model_not_found")
        if task not in (None, about[name]["task"]):
            raise ApiError(400, f"model '{name}' does {about[name]['task']}, not {task}", "model")
        return name

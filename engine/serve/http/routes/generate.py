"""Text generation: /v1/completions and /v1/chat/completions, whole or as a stream of server-sent events."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.exceptions import RayTaskError

from engine.serve.http.errors import ApiError
from engine.serve.http.middleware import RequestContext
from engine.serve.http.request_handler import UNAVAILABLE, RequestHandler, handler_of, success
from engine.serve.http.responses import ChatFormatter, CompletionFormatter, ResponseFormatter, usage
from engine.serve.http.schemas import ChatRequest, CompletionRequest, GenerationRequest
from engine.serve.jobs import Choice, GenerationResult, PromptInfo, StreamChunk
from engine.serve.routing.router import RoutedStream
from engine.serve.tracing import FIRST_TOKEN

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue each prompt, as OpenAI's completions do; with `stream`, by server-sent events."""
    handler = handler_of(request)

    async def respond(context: RequestContext) -> Response:
        handler.check_max_tokens(body.max_tokens, "max_tokens")
        prompts = body.prompts()
        handler.check_num_choices(len(prompts), body.n, "prompt")
        handler.check_token_ids(context, prompts, "prompt")
        handler.reserve_tokens(context, prompts, len(prompts) * body.n * body.max_tokens)
        return await generate(handler, context, body, CompletionFormatter())

    return await handler.handle(request, body.model, "completion", respond)


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a chat's last message, as OpenAI's chat completions do; with `stream`, by server-sent events."""
    handler = handler_of(request)

    async def respond(context: RequestContext) -> Response:
        param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        handler.check_max_tokens(body.requested_tokens or 1, param)
        handler.check_num_choices(1, body.n, "n")
        texts = [message.as_dict()["content"] for message in body.messages]
        handler.reserve_tokens(context, texts, body.n * (body.requested_tokens or handler.max_new_tokens))
        return await generate(handler, context, body, ChatFormatter())

    return await handler.handle(request, body.model, "completion", respond)


async def generate(handler: RequestHandler, context: RequestContext, body: GenerationRequest, formatter: ResponseFormatter) -> Response:  # fmt: skip
    """Have a replica do a generation job, and format its result."""
    job = body.job(context.adapter, context.key_name)
    if job.sampling.logit_bias:
        handler.check_token_ids(context, [list(job.sampling.logit_bias)], "logit_bias")
    envelope = {"id": f"{formatter.id_prefix}-{context.id}", "created": int(time.time()), "model": context.requested_model}  # fmt: skip
    if body.stream:
        stream = handler.models.stream(context.model, job)
        prompt = success(await anext(stream))
        assert isinstance(prompt, PromptInfo)
        events = stream_events(handler, context, body, formatter, envelope, prompt, stream)
        return StreamingResponse(events, media_type="text/event-stream")
    result: GenerationResult = success(await handler.models.call(context.model, "complete", job))
    echoed_texts = result.prompt.echoed_texts or [""] * len(result.choices)
    choices = [formatter.choice(choice, text) for choice, text in zip(result.choices, echoed_texts, strict=True)]
    tokens = record_result(handler, context, result.prompt, result.choices)
    if body.store:
        await handler.store_request(context, [{"text": choice.text, "reason": choice.finish_reason} for choice in result.choices])  # fmt: skip
    return JSONResponse(envelope | {"object": formatter.object_type, "choices": choices, "usage": tokens})


async def stream_events(
    handler: RequestHandler,
    context: RequestContext,
    body: GenerationRequest,
    formatter: ResponseFormatter,
    envelope: dict[str, Any],
    prompt: PromptInfo,
    stream: RoutedStream,
) -> AsyncIterator[str]:
    """Yield server-sent events of all choices as they come, and [DONE]; abort the job when the client hangs up."""
    envelope = envelope | {"object": formatter.chunk_object_type}
    last: dict[int, Choice] = {}  # the latest message of each choice
    texts: dict[int, list[str]] = {}  # of each choice, if they are stored
    echoed_texts = dict(enumerate(prompt.echoed_texts))
    is_complete, tokens = False, None
    try:
        async for message in stream:
            chunk = success(message)
            assert isinstance(chunk, StreamChunk)
            for choice in chunk.choices:
                if not last:
                    context.span.add_event(FIRST_TOKEN)
                is_first = choice.index not in last
                delta = formatter.delta(choice, echoed_texts.pop(choice.index, ""), is_first)
                last[choice.index] = choice
                if body.store:
                    texts.setdefault(choice.index, []).append(choice.text)
                yield server_sent_event(envelope | {"choices": [delta]})
        is_complete = True
        tokens = record_result(handler, context, prompt, list(last.values()))
        if body.store:
            outputs = [{"text": "".join(texts[index]), "reason": last[index].finish_reason} for index in sorted(last)]
            await handler.store_request(context, outputs)
        if body.stream_options and body.stream_options.include_usage:
            yield server_sent_event(envelope | {"choices": [], "usage": tokens})
    except ApiError as error:
        is_complete = context.failed = True
        yield server_sent_event(error.body())
    except (*UNAVAILABLE, RayTaskError) as error:  # the replica died
        is_complete = context.failed = True
        yield server_sent_event(ApiError(500, f"{type(error).__name__}: the replica was lost").body())
    finally:
        if not is_complete:  # the client has hung up
            stream.cancel()
        if tokens is None:
            record_result(handler, context, prompt, list(last.values()))
    yield "data: [DONE]\n\n"


def record_result(handler: RequestHandler, context: RequestContext, prompt: PromptInfo, last: Sequence[Choice]) -> dict[str, Any]:  # fmt: skip
    """Record the tokens and the timings of a job, given the latest message of each choice; return the usage."""
    completion_tokens = sum(choice.num_tokens for choice in last)
    handler.record_usage(context, prompt.prompt_tokens, completion_tokens, prompt.cached_tokens)
    for choice in last:
        if choice.timings:
            handler.metrics.observe_timings(context.metric_labels, choice.timings)
    return usage(prompt, completion_tokens)


def server_sent_event(body: dict[str, Any]) -> str:
    """Return a server-sent event with a JSON body."""
    return f"data: {json.dumps(body)}\n\n"

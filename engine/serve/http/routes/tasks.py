"""Tasks other than text generation: classification, embeddings, similarity scores, transcriptions, images."""

import base64
import secrets
import struct
import time
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.serve.http.errors import ApiError
from engine.serve.http.middleware import RequestContext
from engine.serve.http.request_handler import RequestHandler, handler_of, success
from engine.serve.http.responses import input_usage
from engine.serve.http.schemas import ClassifyRequest, EmbeddingRequest, ImageRequest, ScoreRequest
from engine.serve.http.transcriptions import PATH as TRANSCRIPTIONS
from engine.serve.http.transcriptions import read_form, transcription_response, transcription_schema
from engine.serve.jobs import (
    ClassificationJob,
    ClassificationResult,
    EmbeddingJob,
    EmbeddingResult,
    ImageJob,
    ImageResult,
    Prompt,
    TranscriptionJob,
    TranscriptionResult,
)

MAX_INPUTS = 1024  # of one embeddings request

router = APIRouter()


@router.post("/v1/classify")
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """Name the class of each text: {"id", "model", "data": [{"index", "label", "scores"}], "usage"}."""
    handler = handler_of(request)

    async def respond(context: RequestContext) -> Response:
        texts = body.texts()
        handler.reserve_tokens(context, texts, 0)
        result: ClassificationResult = success(
            await handler.models.call(context.model, "classify", ClassificationJob(texts))
        )
        handler.record_usage(context, sum(item.num_tokens for item in result.items))
        data = [{"index": i, "label": item.label, "scores": item.scores} for i, item in enumerate(result.items)]
        if body.store:
            await handler.store_request(context, data)
        return JSONResponse({"id": context.id, "model": context.model, "data": data, "usage": input_usage(context.prompt_tokens)})  # fmt: skip

    return await handler.handle(request, body.model, "classification", respond)


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """Embed each input: the mean of the model's last hidden states, of length 1."""
    handler = handler_of(request)

    async def respond(context: RequestContext) -> Response:
        vectors = await embed(handler, context, body.inputs(), "input")
        encoded = [float32_base64(vector) if body.encoding_format == "base64" else vector for vector in vectors]
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(encoded)]
        return JSONResponse({"object": "list", "model": context.model, "data": data, "usage": input_usage(context.prompt_tokens)})  # fmt: skip

    return await handler.handle(request, body.model, None, respond)


@router.post("/v1/score")
async def score(request: Request, body: ScoreRequest) -> Response:
    """Tell how alike the texts of each pair are, from -1 to 1: the cosine between their embeddings."""
    handler = handler_of(request)

    async def respond(context: RequestContext) -> Response:
        pairs = body.pairs()
        rows = {text: row for row, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        vectors = np.array(await embed(handler, context, list(rows), "text_2"))
        first, second = (vectors[[rows[pair[side]] for pair in pairs]] for side in (0, 1))
        cosines: list[float] = (first * second).sum(1).tolist()
        data = [{"object": "score", "index": i, "score": cosine} for i, cosine in enumerate(cosines)]
        return JSONResponse({"id": context.id, "object": "list", "model": context.model, "data": data, "usage": input_usage(context.prompt_tokens)})  # fmt: skip

    return await handler.handle(request, body.model, None, respond)


@router.post(TRANSCRIPTIONS, openapi_extra=transcription_schema())
async def transcriptions(request: Request) -> Response:
    """Write down what is said in an audio file, sent as a form (multipart/form-data), as OpenAI's transcriptions are."""
    body, audio = await read_form(request)
    handler = handler_of(request)
    await handler.require_task("transcription", "transcribes speech")

    async def respond(context: RequestContext) -> Response:
        info = handler.info(context)
        handler.access_control.reserve_tokens(context, info.audio_positions + info.max_positions)
        job = TranscriptionJob(audio, body.temperature, body.language, with_logprob=body.response_format == "verbose_json")  # fmt: skip
        result: TranscriptionResult = success(await handler.models.call(context.model, "transcribe", job))
        handler.record_usage(context, result.prompt_tokens, result.completion_tokens)
        return transcription_response(body, result)

    return await handler.handle(request, body.model, "transcription", respond)


@router.post("/v1/images/generations")
async def images(request: Request, body: ImageRequest) -> Response:
    """Make images of what the prompt names: {"created", "data": [{"b64_json": a PNG file}], "seed", "usage"}.

    Image i is that of `seed` + i; without one, the seed that was drawn is told.
    """
    handler = handler_of(request)
    await handler.require_task("images", "makes images")

    async def respond(context: RequestContext) -> Response:
        name, image = context.model, handler.info(context).image
        assert image
        size = f"{image.side}x{image.side}"
        if body.size not in (None, "auto", size):
            raise ApiError(400, f"model '{name}' makes images of {size}, not {body.size}: leave size out", "size")
        handler.reserve_tokens(context, [body.prompt], body.n * image.num_tokens)
        seed = secrets.randbits(53) if body.seed is None else body.seed  # which JSON numbers hold exactly
        job = ImageJob(body.prompt, [seed + i for i in range(body.n)])
        result: ImageResult = success(await handler.models.call(name, "generate_images", job))
        handler.record_usage(context, body.n, body.n * image.num_tokens)
        prompt_tokens, completion_tokens = context.prompt_tokens, context.completion_tokens
        usage = {
            "input_tokens": prompt_tokens, "output_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens,
            "input_tokens_details": {"text_tokens": prompt_tokens, "image_tokens": 0},
        }  # fmt: skip
        envelope = {"id": context.id, "created": int(time.time()), "model": name, "seed": seed, "size": size, "output_format": "png"}  # fmt: skip
        return JSONResponse(envelope | {"data": [{"b64_json": png} for png in result.images], "usage": usage})

    return await handler.handle(request, body.model, "images", respond)


async def embed(handler: RequestHandler, context: RequestContext, inputs: Sequence[Prompt], param: str) -> list[list[float]]:  # fmt: skip
    """Return the embedding of each input, of length 1. Raises ApiError for what the model can't embed."""
    name, info = context.model, handler.info(context)
    if context.adapter:
        raise ApiError(400, f"adapters do not apply to embeddings: request model '{name}'", "model")
    if not info.can_embed:
        raise ApiError(400, f"model '{name}' does {info.task}, it does not embed texts", "model")
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"{len(inputs)} inputs are over this endpoint's {MAX_INPUTS}: send fewer", param)
    handler.check_token_ids(context, inputs, param)
    handler.reserve_tokens(context, inputs, 0)
    result: EmbeddingResult = success(await handler.models.call(name, "embed", EmbeddingJob(list(inputs))), param)
    handler.record_usage(context, result.prompt_tokens)
    return result.vectors


def float32_base64(numbers: list[float]) -> str:
    """Return little-endian float32s in base64."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()

"""/v1/audio/transcriptions: the form that clients upload, and OpenAI's forms of what was heard."""

from __future__ import annotations

import zlib
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from engine.serve.http.errors import ApiError
from engine.serve.http.schemas import TranscriptionRequest

PATH = "/v1/audio/transcriptions"
MOST_FIELDS = 16


def form_schema() -> dict[str, Any]:
    """Return what OpenAPI is told of the request's body."""
    schema = TranscriptionRequest.model_json_schema()
    file = {"type": "string", "format": "binary", "description": "WAV, FLAC, OGG or MP3"}
    schema["properties"] = {"file": file, **schema["properties"]}
    schema["required"] = ["file"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def uploaded(request: Request) -> tuple[TranscriptionRequest, bytes]:
    """Return a form's fields, and the bytes of its file. Raises ApiError, RequestValidationError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send the audio file and its fields as multipart/form-data", "file")
    async with request.form(max_files=1, max_fields=MOST_FIELDS) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "file: there is none in this form: send an audio file", "file")
        content = await file.read()
        fields: dict[str, Any] = {name: value for name, value in form.items() if name != "file"}
    if not content:
        raise ApiError(400, "file: it is empty: send an audio file", "file")
    try:
        return TranscriptionRequest(**fields), content
    except ValidationError as error:
        told = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_context=False)]
        raise RequestValidationError(told) from error


def response(body: TranscriptionRequest, found: dict[str, Any]) -> Response:
    """Return what a replica heard in the form that is asked for."""
    if body.response_format == "text":
        return PlainTextResponse(found["text"])
    if body.response_format == "json":
        read, written = found["read"], found["written"]
        spent = {"type": "tokens", "input_tokens": read, "output_tokens": written, "total_tokens": read + written}
        return JSONResponse({"text": found["text"], "usage": spent})
    whole: dict[str, Any] = {"task": "transcribe", "duration": found["seconds"], "text": found["text"]}
    if body.language:
        whole["language"] = body.language
    usage = {"type": "duration", "seconds": found["seconds"]}
    return JSONResponse(whole | {"segments": [segment(body, found)], "usage": usage})


def segment(body: TranscriptionRequest, found: dict[str, Any]) -> dict[str, Any]:
    """Return the one segment that a window of sound is, as OpenAI tells it."""
    text = found["text"].encode()
    return {
        "id": 0, "seek": 0, "start": 0.0, "end": found["seconds"], "text": found["text"], "tokens": found["tokens"],
        "temperature": body.temperature, "avg_logprob": found["avg_logprob"],
        "compression_ratio": len(text) / len(zlib.compress(text)),
    }  # fmt: skip

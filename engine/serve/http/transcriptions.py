"""/v1/audio/transcriptions: the form that clients upload, and OpenAI's responses."""

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
from engine.serve.jobs import TranscriptionResult

PATH = "/v1/audio/transcriptions"
MAX_FIELDS = 16


def transcription_schema() -> dict[str, Any]:
    """Return the OpenAPI description of the request's body."""
    schema = TranscriptionRequest.model_json_schema()
    file = {"type": "string", "format": "binary", "description": "WAV, FLAC, OGG or MP3"}
    schema["properties"] = {"file": file, **schema["properties"]}
    schema["required"] = ["file"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def read_form(request: Request) -> tuple[TranscriptionRequest, bytes]:
    """Return a form's fields and the content of its file. Raises ApiError, RequestValidationError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send the audio file and its fields as multipart/form-data", "file")
    async with request.form(max_files=1, max_fields=MAX_FIELDS) as form:
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
        errors = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors(include_context=False)]
        raise RequestValidationError(errors) from error


def transcription_response(body: TranscriptionRequest, result: TranscriptionResult) -> Response:
    """Return a transcript in the format that the client asks for."""
    if body.response_format == "text":
        return PlainTextResponse(result.text)
    if body.response_format == "json":
        prompt_tokens, completion_tokens = result.prompt_tokens, result.completion_tokens
        tokens = {
            "type": "tokens", "input_tokens": prompt_tokens, "output_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }  # fmt: skip
        return JSONResponse({"text": result.text, "usage": tokens})
    content: dict[str, Any] = {"task": "transcribe", "duration": result.duration_s, "text": result.text}
    if body.language:
        content["language"] = body.language
    usage = {"type": "duration", "seconds": result.duration_s}
    return JSONResponse(content | {"segments": [transcript_segment(body, result)], "usage": usage})


def transcript_segment(body: TranscriptionRequest, result: TranscriptionResult) -> dict[str, Any]:
    """Return the only segment of a transcript, the whole window of audio, in OpenAI's form."""
    text = result.text.encode()
    return {
        "id": 0, "seek": 0, "start": 0.0, "end": result.duration_s, "text": result.text, "tokens": result.tokens,
        "temperature": body.temperature, "avg_logprob": result.avg_logprob,
        "compression_ratio": len(text) / len(zlib.compress(text)),
    }  # fmt: skip

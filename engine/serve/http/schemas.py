"""Request bodies: OpenAI's fields, validated. A field that would have no effect is refused, not ignored."""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from engine.serve.jobs import MAX_LOGPROBS, GenerationJob, SamplingParams

Token = Annotated[StrictInt, Field(ge=0)]
Prompt = str | Annotated[list[Token], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]  # fmt: skip
Texts = str | Annotated[list[str], Field(min_length=1, max_length=1024)]
Bias = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]]


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


class Strict(BaseModel):
    """A body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Body(Strict):
    """The body of a request."""

    @model_validator(mode="before")
    @classmethod
    def _check_characters(cls, body: Any) -> Any:
        """Refuse lone surrogates, which JSON can encode (\\ud800) and no tokenizer takes."""
        if isinstance(body, bytes):
            return body  # not JSON: pydantic says what is expected
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text has a lone surrogate, \\ud800 to \\udfff, which is no character") from error
        except RecursionError as error:
            raise ValueError("this is nested too deeply") from error
        return body


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False


class JsonSchema(Strict):
    """A schema by its name; `strict` or not, it is followed."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class GenerationRequest(Body):
    """Fields that completions and chats have in common."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, le=2**31)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Bias | None = Field(None, max_length=300)
    user: str | None = Field(None, max_length=256)  # end user of the client; users take turns in the queue
    response_format: ResponseFormat | None = None
    store: bool | None = None  # whether the request and its output may be stored for training

    def stops(self) -> list[str]:
        """Return the stop texts."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    def output_schema(self) -> str | None:
        """Return the JSON Schema that the texts have to follow; None: any text."""
        if isinstance(self.response_format, SchemaFormat):
            return json.dumps(self.response_format.json_schema.schema_)
        return '{"type": "object"}' if isinstance(self.response_format, JsonFormat) else None

    def sampling_params(self) -> SamplingParams:
        """Return the sampling parameters."""
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
        )  # fmt: skip

    def client(self, key_name: str) -> str:
        """Return the client that takes turns with others in a replica's queue: the end user, within an API key if there is one."""
        return f"{key_name} {self.user or ''}" if key_name else self.user or ""

    @abstractmethod
    def job(self, adapter: str = "", key_name: str = "") -> GenerationJob:
        """Return the job for a replica."""


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    # Not supported: only the neutral value is accepted.
    suffix: None = None
    best_of: int | None = Field(None, ge=1, le=1)

    @model_validator(mode="after")
    def _check_has_output(self) -> CompletionRequest:
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens 0 leaves nothing to return: use 1 or more, or echo")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]

    def job(self, adapter: str = "", key_name: str = "") -> GenerationJob:
        """Return the job for a replica."""
        return GenerationJob(
            prompts=self.prompts(), messages=None, max_tokens=self.max_tokens, sampling=self.sampling_params(), n=self.n,
            stop=self.stops(), seed=self.seed, logprobs=self.logprobs, echo=self.echo, json_schema=self.output_schema(),
            stream=self.stream, client=self.client(key_name), adapter=adapter,
        )  # fmt: skip


class ContentPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]
    name: str | None = None

    def as_dict(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def requested_tokens(self) -> int | None:
        """Maximum number of tokens of a choice; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    def job(self, adapter: str = "", key_name: str = "") -> GenerationJob:
        """Return the job for a replica."""
        return GenerationJob(
            prompts=[], messages=[message.as_dict() for message in self.messages], max_tokens=self.requested_tokens,
            sampling=self.sampling_params(), n=self.n, stop=self.stops(), seed=self.seed,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None, json_schema=self.output_schema(),
            stream=self.stream, client=self.client(key_name), adapter=adapter,
        )  # fmt: skip


class ClassifyRequest(Body):
    """POST /v1/classify."""

    model: str | None = None
    input: Texts
    store: bool | None = None

    def texts(self) -> list[str]:
        """Return the texts one by one."""
        return _as_list(self.input)


class TranscriptionRequest(Body):
    """POST /v1/audio/transcriptions: the fields of its form beside the file."""

    model: str | None = None
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$")  # ISO 639: en, de
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)


class ImageRequest(Body):
    """POST /v1/images/generations; `seed` is ours."""

    model: str | None = None
    prompt: str = Field(min_length=1, max_length=1000)
    n: int = Field(1, ge=1, le=10)
    size: str | None = Field(None, pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    seed: int | None = Field(None, ge=0, lt=2**62)
    response_format: Literal["b64_json", "url"] | None = None
    user: str | None = Field(None, max_length=256)
    # Not supported: only the neutral value is accepted.
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto"] | None = None
    stream: Literal[False] | None = None

    @field_validator("response_format")
    @classmethod
    def _check_response_format(cls, response_format: str | None) -> str | None:
        if response_format == "url":
            raise ValueError("images are returned in the response and not stored at a URL: use b64_json")
        return response_format


class Feedback(Body):
    """POST /v1/feedback: what somebody thinks of an answer."""

    request: str = Field(pattern=r"^[A-Za-z0-9._-]{1,160}$")  # the answer's id, or its X-Request-Id
    rating: Literal["up", "down"] | None = None
    label: str | None = Field(None, min_length=1, max_length=1000)  # the right one
    text: str | None = Field(None, min_length=1)  # what the answer should have been
    comment: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check_not_empty(self) -> Feedback:
        if not (self.rating or self.label or self.text or self.comment):
            raise ValueError("the feedback is empty: give a rating, a label, a text or a comment")
        return self


class ScoreRequest(Body):
    """POST /v1/score: pairs of texts, or one text with each of several."""

    model: str | None = None
    text_1: Texts
    text_2: Texts
    user: str | None = None  # accepted and ignored

    @model_validator(mode="after")
    def _check_pairs(self) -> ScoreRequest:
        first, second = _as_list(self.text_1), _as_list(self.text_2)
        if len(first) not in (1, len(second)):
            raise ValueError(f"text_1 holds {len(first)} texts and text_2 {len(second)}: give as many, or one text_1")
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs one by one."""
        first, second = _as_list(self.text_1), _as_list(self.text_2)
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None  # accepted and ignored

    def inputs(self) -> list[str | list[int]]:
        """Return the inputs one by one."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [list(self.input)]  # type: ignore[arg-type]
        return list(self.input)  # type: ignore[arg-type]

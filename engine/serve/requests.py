"""What clients may send: OpenAI's fields, checked. A field that would change nothing here is refused, not ignored."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt

Token = Annotated[StrictInt, Field(ge=0)]
Prompt = str | Annotated[list[Token], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]  # fmt: skip


class Strict(BaseModel):
    """A request that has no other fields than these."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False


class CompletionRequest(Strict):
    """POST /v1/completions."""

    model: str | None = None
    prompt: Prompt
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    user: str | None = None  # whom the client asks for; used for nothing
    # Not served: clients that send the neutral value are understood.
    logprobs: None = None
    suffix: None = None
    best_of: int | None = Field(None, ge=1, le=1)
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]

    def stops(self) -> list[str]:
        """Return the stop texts."""
        return [word for word in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if word]


class ClassifyRequest(Strict):
    """POST /v1/classify."""

    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1, max_length=1024)]

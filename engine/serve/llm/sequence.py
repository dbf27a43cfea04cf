"""A sequence: one prompt and the tokens that are generated for it, with its state in the engine."""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass, field
from typing import Any

from engine.serve.jobs import SamplingParams
from engine.serve.llm.ngram import DraftState
from engine.serve.llm.sampler import Mask, TokenLogprobs


class QueueFull(Exception):
    """As many sequences are waiting as the queue may hold."""


@dataclass(eq=False)
class Sequence:
    """One sequence of a request. The engine's thread appends tokens; a listener reads them and may abort it."""

    prompt: list[int]
    max_tokens: int  # to generate
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    num_logprobs: int | None = None  # likeliest tokens returned with each token; None: no log-probabilities at all
    needs_prompt_logprobs: bool = False  # the same for the prompt's tokens
    client: str = ""  # the queue is fair between clients
    adapter: str = ""  # name of a LoRA adapter; "": the base model
    deadline: float = float("inf")  # on time.monotonic: expired unless it has a slot by then
    streams: bool = False  # its listener is notified of each token, not only of the end
    listener: Any = None  # set by the caller, for its `on_output`
    aborted: bool = False  # by its listener; dropped at the next step
    mask: Mask | None = None  # tokens that its grammar allows
    json_schema: str = ""  # for an engine that makes masks itself

    tokens: list[int] = field(default_factory=list)  # generated so far
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens, and of the end token
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt from its second token on
    finish_reason: str | None = None  # stop, length, error, expired, abort; set last; None: unfinished
    error: str = ""
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    # On time.monotonic; 0: not yet.
    queued_at: float = 0.0
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0

    slot: int = -1  # in the KV cache; -1: not yet
    num_computed_tokens: int = 0  # whose keys and values are in the KV cache
    rng: random.Random = field(default_factory=random.Random)
    draft: DraftState = field(default_factory=DraftState)

    def __post_init__(self) -> None:
        self.rng = random.Random(secrets.randbits(64) if self.seed is None else self.seed)

    @property
    def max_total_tokens(self) -> int:
        """Tokens that it may come to hold in the KV cache."""
        return len(self.prompt) + self.max_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and generated ones."""
        return len(self.prompt) + len(self.tokens)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that have yet to go through the model."""
        return self.num_tokens - self.num_computed_tokens

    def slice_tokens(self, start: int, end: int) -> list[int]:
        """Return tokens start to end of the prompt and the generated tokens, end to end."""
        prompt_len = len(self.prompt)
        return [*self.prompt[start:end], *self.tokens[max(start - prompt_len, 0) : max(end - prompt_len, 0)]]

    def next_tokens(self, count: int) -> list[int]:
        """Return the next tokens to go through the model: `count` of the prompt, or the generated ones."""
        if self.num_computed_tokens < len(self.prompt):
            return self.prompt[self.num_computed_tokens : self.num_computed_tokens + count]
        return self.tokens[self.num_computed_tokens - len(self.prompt) :]

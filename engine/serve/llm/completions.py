"""Generation jobs on an engine: from prompts to sequences, and from their tokens to choices.

At a hang-up, the coroutine that follows a job is closed and aborts its sequences: `Completions.follow` ->
`LLMEngine.abort` -> `Scheduler.drop_aborted` -> `KVCacheManager.free`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Any

from engine.serve.jobs import Choice, Failure, GenerationJob, Prompt, PromptInfo, Timings
from engine.serve.llm.chat_template import TemplateError, chat_prompt
from engine.serve.llm.detokenizer import Detokenizer, LogprobsFormatter
from engine.serve.llm.engine import LLMEngine
from engine.serve.llm.sampler import Mask
from engine.serve.llm.sequence import QueueFull, Sequence
from engine.serve.llm.structured_output import GrammarCompiler, InvalidSchema

LONG_TEXT = 20_000  # characters; longer ones are tokenized off the event loop


class JobRejected(Exception):
    """A job that a replica refuses or cannot finish."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.failure, self.status = Failure(message, param, status), status


class Listener:
    """Wakes the coroutine that follows a job's sequences, from the engine's thread."""

    def __init__(self) -> None:
        self.loop, self.has_output = asyncio.get_running_loop(), asyncio.Event()


def notify_listeners(sequences: list[Sequence]) -> None:
    """Wake the listeners of these sequences, all of an event loop in one call of it."""
    listeners = defaultdict(set)
    for sequence in sequences:
        listeners[sequence.listener.loop].add(sequence.listener)
    for loop, of_loop in listeners.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_wake, of_loop)


def _wake(listeners: set[Listener]) -> None:
    for listener in listeners:
        listener.has_output.set()


@dataclass
class ChoiceState:
    """A sequence, and what was returned of it."""

    index: int
    sequence: Sequence
    text: Detokenizer
    logprobs: LogprobsFormatter
    num_read: int = 0  # tokens
    finished: bool = False


class Completions:
    """Runs generation jobs on an engine."""

    def __init__(
        self, engine: LLMEngine, tokenizer: Any, adapters: Collection[str], max_new_tokens: int, queue_timeout_s: float
    ) -> None:
        """Generate `max_new_tokens` where a job has no number; a sequence expires `queue_timeout_s` after it was queued."""
        self.engine, self.tokenizer, self.adapters = engine, tokenizer, adapters
        self.max_new_tokens, self.queue_timeout_s = max_new_tokens, queue_timeout_s
        self.active: set[Sequence] = set()
        self._grammars: GrammarCompiler | None = None  # made at its first use

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that active sequences have yet to compute and may yet generate."""
        return sum(
            sequence.max_total_tokens - sequence.num_computed_tokens
            for sequence in list(self.active)
            if sequence.finish_reason is None
        )

    async def begin(self, job: GenerationJob) -> tuple[int, list[str], list[ChoiceState]]:
        """Queue a job's sequences; return the prompts' tokens, the echoed text of each choice, and the choices.

        Raises JobRejected.
        """
        if job.adapter not in (
            "",
            *self.adapters,
        ):  # the request was sent to a canary that has it, which was rolled back
            raise JobRejected(f"there is no adapter '{job.adapter}' here", "model", status=404)
        stop = list(job.stop)
        if job.messages is not None:
            try:
                ids, template_stop = chat_prompt(self.tokenizer, job.messages)
            except TemplateError as error:
                raise JobRejected(str(error), "messages") from error
            prompts, stop = [ids or [self.tokenizer.eos_token_id]], stop + template_stop
            texts = [""]
        else:
            prompts = [await token_ids(self.tokenizer, prompt) for prompt in job.prompts]
            texts = [self._text(prompt) for prompt in job.prompts] if job.echo else []
        listener = Listener()
        sequences = [self._sequence(job, prompt, i, bool(stop), listener) for prompt in prompts for i in range(job.n)]
        if job.json_schema:
            masks = await self._masks(job.json_schema, len(sequences))
            for sequence, mask in zip(sequences, masks, strict=True):
                sequence.mask = mask
        try:
            self.engine.submit(sequences)
        except QueueFull as error:
            raise JobRejected("too many requests wait: try again in a second", status=429) from error
        choices = [
            ChoiceState(
                i, sequence, Detokenizer(self.tokenizer, sequence.prompt, stop),
                LogprobsFormatter(self.tokenizer, sequence, job.echo),
            )
            for i, sequence in enumerate(sequences)
        ]  # fmt: skip
        return sum(map(len, prompts)), [text for text in texts for _ in range(job.n)], choices

    async def follow(self, job: GenerationJob, choices: list[ChoiceState]) -> AsyncIterator[list[Choice]]:
        """Yield what is new of a job's choices until all are finished; abort what is left. Raises JobRejected."""
        listener = choices[0].sequence.listener
        self.active.update(choice.sequence for choice in choices)
        try:
            while not all(choice.finished for choice in choices):
                await listener.has_output.wait()
                listener.has_output.clear()
                new = [self._read(job, choice) for choice in choices if not choice.finished]
                if outputs := [choice for choice in new if choice]:
                    yield outputs
        finally:  # also at a hang-up of the client, which closes this generator
            self.active.difference_update(choice.sequence for choice in choices)
            unfinished = [choice.sequence for choice in choices if not choice.sequence.finish_reason]
            if unfinished:
                self.engine.abort(unfinished)

    def _read(self, job: GenerationJob, choice: ChoiceState) -> Choice | None:
        """Return what is new of a choice; None where nothing is, or the job wants finished choices only."""
        sequence, text = choice.sequence, choice.text
        reason = sequence.finish_reason  # read before the tokens: it is set last
        if reason == "error":
            raise JobRejected(sequence.error, status=500)
        if reason == "expired":
            raise JobRejected("no place was free in time: try again in a second", status=503)
        tokens = sequence.tokens[choice.num_read :]
        choice.num_read += len(tokens)
        text.add(tokens)
        if reason:
            text.end()
        if text.stopped and not reason:
            self.engine.abort([sequence])
        choice.finished = text.stopped or reason is not None
        if not (choice.finished or job.stream):
            return None
        new_text = text.take(last=choice.finished)
        if not (new_text or choice.finished):
            return None
        logprobs = None
        if job.logprobs is not None:
            # Completions, unlike chats, return the end token, too, as OpenAI's do; lm-eval depends on it.
            includes_end = reason == "stop" and not text.stopped and not job.is_chat
            take = choice.logprobs.take_chat if job.is_chat else choice.logprobs.take
            logprobs = take(text.num_tokens + includes_end)
        finish_reason = ("stop" if text.stopped else reason) if choice.finished else None
        return Choice(
            choice.index, new_text, text.num_tokens, finish_reason, logprobs,
            timings(sequence) if choice.finished else None,
        )  # fmt: skip

    def _sequence(
        self, job: GenerationJob, prompt: list[int], copy: int, has_stop: bool, listener: Listener
    ) -> Sequence:
        max_seq_len, max_tokens = self.engine.max_seq_len, job.max_tokens
        if max_tokens is None:
            max_tokens = min(self.max_new_tokens, max(max_seq_len - len(prompt), 1))
        if len(prompt) + max_tokens > max_seq_len:
            raise JobRejected(
                f"the prompt's {len(prompt):,} tokens and max_tokens {max_tokens:,} are over the model's {max_seq_len:,} positions: use less",
                "max_tokens",
            )
        return Sequence(
            prompt, max_tokens, job.sampling,
            seed=None if job.seed is None else job.seed + copy,
            num_logprobs=job.logprobs, needs_prompt_logprobs=job.echo and job.logprobs is not None, client=job.client,
            adapter=job.adapter, json_schema=job.json_schema or "",
            deadline=time.monotonic() + self.queue_timeout_s, streams=job.stream or has_stop, listener=listener,
        )  # fmt: skip

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        text: str = self.tokenizer.decode(prompt)
        return text

    async def _masks(self, json_schema: str, count: int) -> list[Mask]:
        """Return the masks of sequences that follow a schema. Raises JobRejected for one that cannot be followed."""

        def compile_masks() -> list[Mask]:
            self._grammars = self._grammars or GrammarCompiler(self.tokenizer)
            grammar = self._grammars.compile(json_schema)
            return [self._grammars.mask(grammar) for _ in range(count)]

        try:
            return await asyncio.to_thread(compile_masks)
        except InvalidSchema as error:
            raise JobRejected(f"this schema cannot be followed: {error}", "response_format") from error


async def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return a prompt's tokens; the end token for an empty one."""
    if not isinstance(prompt, str):
        return prompt
    is_long = len(prompt) > LONG_TEXT
    ids: list[int] = (await asyncio.to_thread(tokenizer, prompt) if is_long else tokenizer(prompt))["input_ids"]
    return ids or [tokenizer.eos_token_id]


def prompt_info(prompt_tokens: int, echoed_texts: list[str], choices: list[ChoiceState]) -> PromptInfo:
    """Return what is known of a job's prompts once its first tokens are there."""
    return PromptInfo(prompt_tokens, sum(choice.sequence.num_cached_tokens for choice in choices), echoed_texts)


def timings(sequence: Sequence) -> Timings:
    """Return the times of a finished sequence."""
    first_token_s = inter_token_s = None
    if sequence.first_token_at:
        first_token_s = sequence.first_token_at - sequence.queued_at
    if len(sequence.tokens) > 1:
        finished_at = sequence.finished_at or time.monotonic()  # with a stop text, its slot is not yet free
        inter_token_s = (finished_at - sequence.first_token_at) / (len(sequence.tokens) - 1)
    return Timings(sequence.scheduled_at - sequence.queued_at, first_token_s, inter_token_s)

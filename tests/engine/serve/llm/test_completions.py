"""Generation jobs on a scripted engine: sequences, choices as tokens come, aborts, and refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from engine.config import Config
from engine.data.prepare import prepare
from engine.data.tokenizer import load_tokenizer
from engine.serve.jobs import Choice, GenerationJob
from engine.serve.llm.completions import ChoiceState, Completions, JobRejected, notify_listeners, prompt_info
from engine.serve.llm.sequence import QueueFull, Sequence


class ScriptedEngine:
    """An `LLMEngine` that generates what a test says."""

    max_seq_len = 64
    is_alive = True

    def __init__(self, is_full: bool = False) -> None:
        self.is_full = is_full
        self.submitted: list[Sequence] = []
        self.aborted: list[Sequence] = []

    @property
    def stats(self) -> dict[str, int]:
        return {}

    def submit(self, sequences: list[Sequence]) -> None:
        if self.is_full:
            raise QueueFull
        self.submitted += sequences

    def abort(self, sequences: list[Sequence]) -> None:
        self.aborted += sequences

    def generate(self, index: int, tokens: list[int], finish_reason: str | None = None, error: str = "") -> None:
        """Append tokens to a sequence, and notify its listener."""
        sequence = self.submitted[index]
        sequence.tokens += tokens
        sequence.error, sequence.finish_reason = error, finish_reason
        notify_listeners([sequence])


@pytest.fixture(scope="module")
def tokenizer(tiny: Config) -> PreTrainedTokenizerFast:
    return load_tokenizer(prepare(tiny) / "tokenizer")


def make_completions(tokenizer: Any, engine: ScriptedEngine) -> Completions:
    return Completions(engine, tokenizer, {"poet"}, max_new_tokens=16, queue_timeout_s=30.0)


def make_job(**fields: Any) -> GenerationJob:
    return GenerationJob(**{"prompts": ["x = 1"], "messages": None, "max_tokens": 8} | fields)


async def start(completions: Completions, job: GenerationJob) -> tuple[list[ChoiceState], AsyncIterator[list[Choice]]]:
    _, _, states = await completions.begin(job)
    return states, completions.follow(job, states)


def test_choices_are_streamed_as_tokens_come(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, job = ScriptedEngine(), make_job(stream=True, n=2, seed=5)
    ids = tokenizer("def f(x)")["input_ids"]

    async def run() -> None:
        completions = make_completions(tokenizer, engine)
        prompt_tokens, texts, states = await completions.begin(job)
        assert (prompt_tokens, texts) == (len(tokenizer("x = 1")["input_ids"]), [])
        assert [sequence.seed for sequence in engine.submitted] == [5, 6]
        assert completions.num_pending_tokens == 0, "nobody follows them yet"
        choices = completions.follow(job, states)
        engine.submitted[1].num_cached_tokens = 2
        engine.generate(1, ids[:1])
        assert [(choice.index, choice.finish_reason) for choice in await anext(choices)] == [(1, None)]
        assert prompt_info(prompt_tokens, texts, states).cached_tokens == 2
        assert completions.num_pending_tokens == 2 * (prompt_tokens + 8)
        engine.generate(0, ids, "length")
        (choice,) = await anext(choices)
        assert (choice.index, choice.text, choice.num_tokens, choice.finish_reason) == (
            0,
            "def f(x)",
            len(ids),
            "length",
        )
        assert choice.timings
        engine.generate(1, ids[1:], "stop")
        assert [choice.finish_reason for choice in await anext(choices)] == ["stop"]
        with pytest.raises(StopAsyncIteration):
            await anext(choices)
        assert not completions.active

    asyncio.run(run())
    assert not engine.aborted


def test_hang_up_aborts_unfinished_sequences(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, job = ScriptedEngine(), make_job(stream=True, n=3)

    async def run() -> None:
        completions = make_completions(tokenizer, engine)
        _, choices = await start(completions, job)
        engine.generate(0, [7], "length")
        await anext(choices)
        await choices.aclose()  # type: ignore[attr-defined]
        assert not completions.active

    asyncio.run(run())
    assert engine.aborted == engine.submitted[1:]


def test_stop_text_finishes_a_choice_and_aborts_its_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, job = ScriptedEngine(), make_job(stop=["(x"])

    async def run() -> None:
        _, choices = await start(make_completions(tokenizer, engine), job)
        assert engine.submitted[0].streams, "each token has to be compared with the stop text"
        engine.generate(0, tokenizer("def f(x)")["input_ids"])
        (choice,) = await anext(choices)
        assert (choice.text, choice.finish_reason) == ("def f", "stop")
        assert engine.aborted == engine.submitted

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "is_full", "message", "param", "status"),
    [
        ({"max_tokens": 64}, False, "are over the model's 64 positions: use less", "max_tokens", 400),
        ({"adapter": "clerk"}, False, "there is no adapter 'clerk' here", "model", 404),
        ({"json_schema": '{"type": "objekt"}'}, False, "this schema cannot be followed", "response_format", 400),
        ({}, True, "too many requests wait", None, 429),
    ],
)
def test_job_is_rejected(
    tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any], is_full: bool, message: str, param: str | None, status: int
) -> None:  # fmt: skip
    completions = make_completions(tokenizer, ScriptedEngine(is_full))
    with pytest.raises(JobRejected, match=message) as caught:
        asyncio.run(start(completions, make_job(**fields)))
    assert (caught.value.failure.param, caught.value.failure.status) == (param, status)


@pytest.mark.parametrize(
    ("finish_reason", "message", "status"),
    [("error", "out of memory", 500), ("expired", "no place was free in time", 503)],
)
def test_failed_sequence_fails_its_job(
    tokenizer: PreTrainedTokenizerFast, finish_reason: str, message: str, status: int
) -> None:
    engine = ScriptedEngine()

    async def run() -> None:
        _, choices = await start(make_completions(tokenizer, engine), make_job(n=2))
        engine.generate(0, [], finish_reason, "out of memory")
        with pytest.raises(JobRejected, match=message) as caught:
            await anext(choices)
        assert caught.value.status == status

    asyncio.run(run())
    assert engine.aborted == engine.submitted[1:]

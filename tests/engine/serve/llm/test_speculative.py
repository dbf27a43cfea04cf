"""Guessing ahead changes how many forwards a text takes, and no token, chance or score."""

from __future__ import annotations

import asyncio
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.config import Config, ServeConfig
from engine.serve.http.schemas import CompletionRequest
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.model_runner import BatchedRunner
from engine.serve.jobs import SamplingParams
from engine.serve.llm.speculative import DraftState
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.test_engine import CONFIGS, EngineHarness, requests


@pytest.mark.parametrize("kind", CONFIGS)
def test_guessing_ahead_changes_no_token(kind: str) -> None:
    asked = requests(kind)
    plain, quick = EngineHarness(kind), EngineHarness(kind, num_speculative_tokens=4)
    found = {}
    for name, harness in (("plain", plain), ("quick", quick)):
        alone = [harness.generate([Sequence(prompt, most)])[0].tokens for prompt, most, _ in asked[:4]]
        together = harness.generate([Sequence(prompt, most) for prompt, most, _ in asked])
        found[name] = [*alone, *(it.tokens for it in together)]
        assert {it.finish_reason for it in together} <= {"stop", "length"}
    assert found["quick"] == found["plain"] == [right for *_, right in [*asked[:4], *asked]]
    load = quick.engine.stats
    if isinstance(quick.engine.runner, BatchedRunner):
        assert 0 < load["right_tokens"] <= load["guessed_tokens"]
        assert load["steps"] < plain.engine.stats["steps"]
    else:
        assert load["guessed_tokens"] == 0


def test_guessing_ahead_changes_no_chance_and_no_score() -> None:
    dice = random.Random(3)
    word = [dice.randrange(6, 300) for _ in range(6)]
    samplings = [
        SamplingParams(), SamplingParams(0.05), SamplingParams(0.3, top_p=0.9), SamplingParams(1.0, top_k=5), SamplingParams(0.2, frequency_penalty=0.5),
        SamplingParams(logit_bias={word[0]: 20.0, word[1]: 20.0}),
    ]  # fmt: skip
    found = []
    for num_speculative_tokens in (0, 1, 3, 8):
        harness = EngineHarness("llama", num_speculative_tokens=num_speculative_tokens)
        asked = [Sequence(word * 4, 40, sampling, seed=i, num_logprobs=2) for i, sampling in enumerate(samplings)]
        found.append([(it.tokens, it.finish_reason, it.token_logprobs) for it in harness.generate(asked)])
        if num_speculative_tokens:
            assert harness.engine.stats["right_tokens"] > 0
    for other in found[1:]:
        for (tokens, reason, scores), (right, why, wanted) in zip(other, found[0], strict=True):
            assert (tokens, reason) == (right, why)
            assert [it.token for it in scores] == [it.token for it in wanted]
            assert [it.logprob for it in scores] == pytest.approx([it.logprob for it in wanted], abs=1e-4)


def test_a_text_is_guessed_from_itself() -> None:
    assert DraftState().propose([1, 2, 3, 4, 1, 2], [3], 2) == [4, 1]
    assert DraftState().propose([1, 2, 3, 4, 9, 2, 3], [5, 2, 3], 3) == [5, 2]  # what followed last
    assert DraftState().propose([1, 2, 3], [4], 2) == []
    assert DraftState().propose([7], [7, 7], 1) == [7]
    assert DraftState().propose([1], [], 3) == []
    draft, prompt, written = DraftState(), [1, 2, 8, 1], [2]
    assert draft.propose(prompt, written, 9) == [8, 1]
    written += [8, 1, 2]
    assert draft.propose(prompt, written, 9) == [8, 1, 2, 8, 1]  # more after what was right
    written += [8, 1, 5, 1, 2]
    assert draft.propose(prompt, written, 9) == [8, 1, 5]  # less where a part was wrong


def test_wrong_guesses_become_rare() -> None:
    draft, written, guesses = DraftState(), [1, 2, 1, 2], []
    for token in range(100, 900):
        guesses.append(list(draft.propose([], written, 8)))
        written += [token, 1, 2]
    assert guesses[0] == [1, 2]
    assert 10 < sum(map(bool, guesses)) < 20
    assert max(map(len, guesses[1:])) == 1


def test_a_replica_guesses_where_it_is_asked_to(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    job = CompletionRequest(prompt="x = 1\ny = 2\n" * 3, max_tokens=60, temperature=0, logprobs=1).job()
    found, forwards = [], []
    for num_speculative_tokens in (0, 6):
        replica = Replica(
            str(bundle.folder), asdict(ServeConfig(precision="fp32", num_speculative_tokens=num_speculative_tokens))
        )
        found.append([it["text"] for it in asyncio.run(replica.complete(job))["choices"]])
        figures = replica.stats()
        assert (figures["right_tokens"] > 0) == (num_speculative_tokens > 0)
        forwards.append(figures["steps"])
    assert found[0] == found[1]
    assert forwards[1] < forwards[0]

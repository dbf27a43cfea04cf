"""Speculative decoding from the text itself changes the number of forwards, and no token, random number or log-probability."""

from __future__ import annotations

import asyncio
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.config import Config, ServeConfig
from engine.serve.http.schemas import CompletionRequest
from engine.serve.jobs import GenerationResult, SamplingParams
from engine.serve.llm.model_runner import BatchedRunner
from engine.serve.llm.ngram import DraftState
from engine.serve.llm.sequence import Sequence
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.engine_harness import CONFIGS, EngineHarness, requests, tokens_of


@pytest.mark.parametrize("family", CONFIGS)
def test_draft_tokens_change_no_token(family: str) -> None:
    cases = requests(family)
    plain, speculative = EngineHarness(family), EngineHarness(family, num_speculative_tokens=4)
    for harness in (plain, speculative):
        alone = [harness.generate([case.sequence()])[0].tokens for case in cases[:4]]
        batched = harness.generate([case.sequence() for case in cases])
        assert [*alone, *tokens_of(batched)] == [case.expected for case in [*cases[:4], *cases]]
        assert {sequence.finish_reason for sequence in batched} <= {"stop", "length"}
    stats = speculative.engine.stats
    if isinstance(speculative.engine.runner, BatchedRunner):
        assert 0 < stats["right_tokens"] <= stats["guessed_tokens"]
        assert stats["steps"] < plain.engine.stats["steps"]
    else:
        assert stats["guessed_tokens"] == 0


def test_draft_tokens_change_no_sample_and_no_logprob() -> None:
    rng = random.Random(3)
    word = [rng.randrange(6, 300) for _ in range(6)]
    samplings = [
        SamplingParams(), SamplingParams(0.05), SamplingParams(0.3, top_p=0.9), SamplingParams(1.0, top_k=5),
        SamplingParams(0.2, frequency_penalty=0.5), SamplingParams(logit_bias={word[0]: 20.0, word[1]: 20.0}),
    ]  # fmt: skip
    batches = []
    for num_speculative_tokens in (0, 1, 3, 8):
        harness = EngineHarness("llama", num_speculative_tokens=num_speculative_tokens)
        sequences = [Sequence(word * 4, 40, sampling, seed=i, num_logprobs=2) for i, sampling in enumerate(samplings)]
        batches.append(harness.generate(sequences))
        if num_speculative_tokens:
            assert harness.engine.stats["right_tokens"] > 0
    for batch in batches[1:]:
        for sequence, expected in zip(batch, batches[0], strict=True):
            assert_same_output(sequence, expected)


def assert_same_output(sequence: Sequence, expected: Sequence) -> None:
    """Check that tokens and finish reason are the same, and log-probabilities close."""
    assert (sequence.tokens, sequence.finish_reason) == (expected.tokens, expected.finish_reason)
    logprobs, expected_logprobs = sequence.token_logprobs, expected.token_logprobs
    assert [entry.token for entry in logprobs] == [entry.token for entry in expected_logprobs]
    values = [entry.logprob for entry in expected_logprobs]
    assert [entry.logprob for entry in logprobs] == pytest.approx(values, abs=1e-4)


def test_tokens_are_proposed_from_the_text_itself() -> None:
    assert DraftState().propose([1, 2, 3, 4, 1, 2], [3], 2) == [4, 1]
    assert DraftState().propose([1, 2, 3, 4, 9, 2, 3], [5, 2, 3], 3) == [5, 2]  # after the last occurrence
    assert DraftState().propose([1, 2, 3], [4], 2) == []
    assert DraftState().propose([7], [7, 7], 1) == [7]
    assert DraftState().propose([1], [], 3) == []
    draft, prompt, generated = DraftState(), [1, 2, 8, 1], [2]
    assert draft.propose(prompt, generated, 9) == [8, 1]
    generated += [8, 1, 2]
    assert draft.propose(prompt, generated, 9) == [8, 1, 2, 8, 1]  # more after accepted tokens
    generated += [8, 1, 5, 1, 2]
    assert draft.propose(prompt, generated, 9) == [8, 1, 5]  # fewer after a rejected one


def test_proposals_become_rare_after_rejections() -> None:
    draft, generated, proposals = DraftState(), [1, 2, 1, 2], []
    for token in range(100, 900):
        proposals.append(list(draft.propose([], generated, 8)))
        generated += [token, 1, 2]
    assert proposals[0] == [1, 2]
    assert 10 < sum(map(bool, proposals)) < 20
    assert max(map(len, proposals[1:])) == 1


def test_replica_needs_fewer_forwards_with_draft_tokens(tiny: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    job = CompletionRequest(prompt="x = 1\ny = 2\n" * 3, max_tokens=60, temperature=0, logprobs=1).job()
    texts, num_forwards = [], []
    for num_speculative_tokens in (0, 6):
        options = ServeConfig(precision="fp32", num_speculative_tokens=num_speculative_tokens)
        replica = Replica(str(bundle.folder), asdict(options))
        result = asyncio.run(replica.complete(job))
        assert isinstance(result, GenerationResult)
        texts.append([choice.text for choice in result.choices])
        stats = replica.load_stats()
        assert (stats["right_tokens"] > 0) == (num_speculative_tokens > 0)
        num_forwards.append(stats["steps"])
    assert texts[0] == texts[1]
    assert num_forwards[1] < num_forwards[0]

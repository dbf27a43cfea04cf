"""Tokens sampled for a batch: the numbers of each rule, and independence of the batch."""

from __future__ import annotations

import random

import pytest
import torch

from engine.serve.jobs import SamplingParams
from engine.serve.llm.sampler import NUM_CANDIDATES, sample


def frequencies(sampling: SamplingParams, logits: list[float], draws: int = 4000) -> list[float]:
    rngs = [random.Random(i) for i in range(draws)]
    tokens = sample(torch.tensor([logits] * draws), [sampling] * draws, [[]] * draws, rngs)
    return [tokens.count(token) / draws for token in range(len(logits))]


def test_greedy_takes_the_largest_logit() -> None:
    assert sample(torch.tensor([[0.0, 2, 1], [3, 2, 1]]), [SamplingParams()] * 2, [[], []], [random.Random()] * 2) == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(1.0), [0.4, 0.3, 0.2, 0.1]),
        (SamplingParams(0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (SamplingParams(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (SamplingParams(1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (SamplingParams(1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (SamplingParams(1.0, top_p=0.6, top_k=3), [4 / 7, 3 / 7, 0, 0]),  # 0.4 / 0.9 is less than 0.6
        (SamplingParams(1e-300), [1, 0, 0, 0]),
    ],
)
def test_samples_follow_the_distribution(sampling: SamplingParams, expected: list[float]) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert frequencies(sampling, logits) == pytest.approx(expected, abs=0.03)


def test_nucleus_larger_than_the_candidates_is_complete() -> None:
    size = 4 * NUM_CANDIDATES
    flat = torch.linspace(0, 1e-3, size)[None].repeat(2000, 1)
    rngs = [random.Random(i) for i in range(2000)]
    tokens = sample(flat, [SamplingParams(1.0, top_p=0.5)] * 2000, [[]] * 2000, rngs)
    assert min(tokens) >= size // 2 - 2
    assert len(set(tokens)) > NUM_CANDIDATES


def test_penalties_and_bias_change_logits() -> None:
    def sample_one(sampling: SamplingParams, generated: list[int]) -> int:
        return sample(torch.tensor([[1.0, 0.6, 0.0]]), [sampling], [generated], [random.Random(0)])[0]

    assert sample_one(SamplingParams(presence_penalty=0.5), [0, 0]) == 1
    assert sample_one(SamplingParams(presence_penalty=0.3), [0, 0]) == 0
    assert sample_one(SamplingParams(frequency_penalty=0.3), [0, 0]) == 1
    assert sample_one(SamplingParams(frequency_penalty=0.3), [0]) == 0
    assert sample_one(SamplingParams(logit_bias={2: 5.0}), []) == 2
    assert sample_one(SamplingParams(logit_bias={0: -100.0}), []) == 1


def test_logits_that_are_not_finite_give_no_token() -> None:
    not_finite = [[0.0, torch.nan], [torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]]
    logits = torch.tensor([*not_finite, [1.0, 0.0], [-torch.inf, -1.0]])
    for sampling in (SamplingParams(), SamplingParams(1.0)):
        tokens = sample(logits, [sampling] * 6, [[]] * 6, [random.Random(0)] * 6)
        assert tokens[:4] == [-1] * 4
        assert tokens[5] == 1
        assert sample(logits.bfloat16(), [SamplingParams()] * 6, [[]] * 6, [random.Random(0)] * 6) == [
            -1,
            -1,
            -1,
            -1,
            0,
            1,
        ]


def test_sample_of_a_row_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 1000)
    samplings = [SamplingParams(), SamplingParams(0.7), SamplingParams(1.0, 0.9), SamplingParams(1.5, 0.99, 40), SamplingParams(1.0, top_k=500), SamplingParams(1.0, 0.999)] * 2  # fmt: skip
    alone = [sample(logits[i : i + 1], [samplings[i]], [[]], [random.Random(i)])[0] for i in range(12)]
    assert sample(logits, samplings, [[]] * 12, [random.Random(i) for i in range(12)]) == alone

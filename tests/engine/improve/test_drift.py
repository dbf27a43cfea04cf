"""Drift is found where it is, and not where it isn't."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from engine.improve.drift import RequestStats, class_bins, measure_drift, numeric_bins, psi, bad_rating_increase


def sample(seed: int, size: int, *, longer: float = 1.0, surer: float = 0.0, first: float = 0.5, bad: float = 0.1) -> RequestStats:  # fmt: skip
    draw = np.random.default_rng(seed)
    lengths = draw.gamma(5, 10 * longer, size)
    return RequestStats(
        lengths.tolist(),
        draw.zipf(1.5, 20 * size).clip(0, 50).tolist(),
        (0.5 + 0.5 * draw.beta(4 + surer, 2, size)).tolist(),
        draw.choice(["a", "b"], size, p=[first, 1 - first]).tolist(),
        (draw.random(size) < bad).tolist(),
    )


def test_the_index_is_its_formula() -> None:
    size, p = psi(np.array([49.5, 49.5]), np.array([74.5, 24.5]), (100, 100))
    assert size == pytest.approx(0.25 * math.log(3))  # (0.5 - 0.75) ln(0.5 / 0.75) + (0.5 - 0.25) ln(0.5 / 0.25)
    assert p == pytest.approx(0.00024, abs=1e-4)  # chi-square of one degree, 50 x 0.2747


def test_nothing_is_found_where_nothing_changed() -> None:
    wrong = 0
    for seed in range(100):
        found = measure_drift(sample(seed, 400), sample(seed + 1000, 150), least_psi=1e-9, least_bad=-1, significance=0.05)
        assert [it.measure for it in found] == ["lengths", "tokens", "confidence", "labels", "bad"]
        wrong += any(it.is_drift for it in found)
    assert wrong <= 10, wrong  # 5 expected at most


@pytest.mark.parametrize(
    ("change", "measure"),
    [({"longer": 1.5}, "lengths"), ({"surer": 8.0}, "confidence"), ({"first": 0.75}, "labels"), ({"bad": 0.4}, "bad")],
)
def test_what_changed_is_named(change: dict[str, float], measure: str) -> None:
    found = measure_drift(sample(0, 400), sample(1, 150, **change), least_psi=0.1, least_bad=0.05, significance=0.01)
    assert [it.measure for it in found if it.is_drift] == [measure]


def test_other_words_are_found() -> None:
    now = sample(1, 150)
    other = replace(now, tokens=[token + 100 for token in now.tokens])
    found = measure_drift(sample(0, 400), other, least_psi=0.1, least_bad=0.05, significance=0.01)
    assert [it.measure for it in found if it.is_drift] == ["tokens"]


def test_a_shift_too_small_to_matter_is_none() -> None:
    old, new = sample(0, 20_000), sample(1, 20_000, longer=1.05)
    (length,) = [it for it in measure_drift(old, new, 0.1, 0.05, 0.01) if it.measure == "lengths"]
    assert length.p_value < 1e-6
    assert not length.is_drift


def test_bins_are_never_nearly_empty() -> None:
    for old, new in (numeric_bins([1.0] * 90 + [2.0] * 10, [2.0, 3.0]), class_bins(list("aaaaabbbbbc"), list("aad"))):
        assert len(old) == len(new)
        assert (old + new >= 5).all()


def test_ratings_are_tested_on_one_side() -> None:
    assert bad_rating_increase([True] * 5 + [False] * 95, [True] * 30 + [False] * 70)[1] < 1e-5
    assert bad_rating_increase([True] * 30 + [False] * 70, [True] * 5 + [False] * 95)[1] > 0.99

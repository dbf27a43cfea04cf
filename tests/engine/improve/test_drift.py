"""Drift is detected where there is some, and not elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from engine.improve.drift import RequestStats, bad_rating_increase, class_bins, measure_drift, numeric_bins, psi


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


def test_psi_equals_its_formula() -> None:
    size, p = psi(np.array([49.5, 49.5]), np.array([74.5, 24.5]), (100, 100))
    assert size == pytest.approx(0.25 * math.log(3))  # (0.5 - 0.75) ln(0.5 / 0.75) + (0.5 - 0.25) ln(0.5 / 0.25)
    assert p == pytest.approx(0.00024, abs=1e-4)  # chi-square of one degree, 50 x 0.2747


def test_false_positive_rate_without_a_change() -> None:
    wrong = 0
    for seed in range(100):
        found = measure_drift(
            sample(seed, 400), sample(seed + 1000, 150), min_psi=1e-9, min_bad_increase=-1, significance=0.05
        )
        assert [drift.measure for drift in found] == ["lengths", "tokens", "confidence", "labels", "bad"]
        wrong += any(drift.is_drift for drift in found)
    assert wrong <= 10, wrong  # 5 expected at most


@pytest.mark.parametrize(
    ("change", "measure"),
    [({"longer": 1.5}, "lengths"), ({"surer": 8.0}, "confidence"), ({"first": 0.75}, "labels"), ({"bad": 0.4}, "bad")],
)
def test_changed_measure_is_named(change: dict[str, float], measure: str) -> None:
    found = measure_drift(
        sample(0, 400), sample(1, 150, **change), min_psi=0.1, min_bad_increase=0.05, significance=0.01
    )
    assert [drift.measure for drift in found if drift.is_drift] == [measure]


def test_new_tokens_are_detected() -> None:
    now = sample(1, 150)
    other = replace(now, tokens=[token + 100 for token in now.tokens])
    found = measure_drift(sample(0, 400), other, min_psi=0.1, min_bad_increase=0.05, significance=0.01)
    assert [drift.measure for drift in found if drift.is_drift] == ["tokens"]


def test_significant_but_small_shift_is_no_drift() -> None:
    old, new = sample(0, 20_000), sample(1, 20_000, longer=1.05)
    (length,) = [drift for drift in measure_drift(old, new, 0.1, 0.05, 0.01) if drift.measure == "lengths"]
    assert length.p_value < 1e-6
    assert not length.is_drift


def test_bins_have_a_minimum_count() -> None:
    for old, new in (numeric_bins([1.0] * 90 + [2.0] * 10, [2.0, 3.0]), class_bins(list("aaaaabbbbbc"), list("aad"))):
        assert len(old) == len(new)
        assert (old + new >= 5).all()


def test_ratings_are_tested_one_sided() -> None:
    assert bad_rating_increase([True] * 5 + [False] * 95, [True] * 30 + [False] * 70)[1] < 1e-5
    assert bad_rating_increase([True] * 30 + [False] * 70, [True] * 5 + [False] * 95)[1] > 0.99

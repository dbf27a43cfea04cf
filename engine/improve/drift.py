"""Test whether recent requests differ from the reference by more than chance.

A measure has drifted if the difference is both large enough to matter and significant, with a Bonferroni correction for the
number of measures. Effect sizes are population stability indices (PSI): the sum over bins of (p - q) ln(p / q), the
symmetric divergence of Jeffreys 1946; 0.1 and 0.25 are its customary thresholds of a moderate and a large shift (Siddiqi
2006, "Credit Risk Scorecards"). With n and m samples in B bins and no change it is about (1/n + 1/m) times a chi-square of
B - 1 degrees of freedom (Yurdakul & Naranjo 2020, "Statistical properties of the population stability index", Journal of
Risk Model Validation 14), which gives its p-value. Ratings are compared by Fisher's exact test, one-sided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

BINS = 10
MIN_BIN_COUNT = 5  # samples of both sides together; a smaller bin is merged with its neighbor
MEASURES = ("lengths", "tokens", "confidence", "labels", "bad")


@dataclass(frozen=True)
class RequestStats:
    """The measures of some requests; a measure that does not apply is empty."""

    lengths: Sequence[float]  # tokens of each input
    tokens: Sequence[int]  # of all inputs, concatenated
    confidence: Sequence[
        float
    ]  # probability of each output; of a text, the geometric mean of its tokens' probabilities
    labels: Sequence[str]  # predicted
    bad: Sequence[bool]  # whether each rating is bad


@dataclass(frozen=True)
class Drift:
    """One measure, in the reference and in the recent requests."""

    measure: str
    before: float  # mean; of labels and tokens: the share of the class (bin) that changed most
    after: float
    effect_size: float  # PSI; of ratings: the difference of the shares of bad ones
    p_value: float
    is_drift: bool
    num_samples: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the keys of drift.json."""
        return {
            "measure": self.measure,
            "before": self.before,
            "after": self.after,
            "size": self.effect_size,
            "p": self.p_value,
            "real": self.is_drift,
            "samples": self.num_samples,
        }


def measure_drift(
    reference: RequestStats, recent: RequestStats, min_psi: float, min_bad_increase: float, significance: float
) -> list[Drift]:
    """Compare each measure that both sides have; a drift is significant, and at least `min_psi` or `min_bad_increase` large."""
    measures = [name for name in MEASURES if len(getattr(reference, name)) and len(getattr(recent, name))]
    drifts = []
    for name in measures:
        old, new = getattr(reference, name), getattr(recent, name)
        if name == "bad":
            effect_size, p_value = bad_rating_increase(old, new)
            before, after, min_size = float(np.mean(old)), float(np.mean(new)), min_bad_increase
        else:
            is_numeric = name in ("lengths", "confidence")
            bins = numeric_bins(old, new) if is_numeric else class_bins(old, new)
            # The tokens of one text are not independent, so each text counts as one draw.
            draws = (len(reference.lengths), len(recent.lengths)) if name == "tokens" else (len(old), len(new))
            effect_size, p_value = psi(*bins, draws)
            before, after = (float(np.mean(old)), float(np.mean(new))) if is_numeric else largest_change(*bins)
            min_size = min_psi
        is_drift = effect_size >= min_size and p_value < significance / len(measures)
        drifts.append(Drift(name, before, after, effect_size, p_value, is_drift, (len(old), len(new))))
    return drifts


def psi(old: np.ndarray, new: np.ndarray, draws: tuple[int, int]) -> tuple[float, float]:
    """Return the PSI of two histograms (counts) and its p-value; half a sample is added to each bin, so that none is empty."""
    p, q = (old + 0.5) / (old + 0.5).sum(), (new + 0.5) / (new + 0.5).sum()
    value = float(((p - q) * np.log(p / q)).sum())
    scale = 1 / draws[0] + 1 / draws[1]
    return value, float(stats.chi2.sf(value / scale, max(len(old) - 1, 1)))


def numeric_bins(old: Sequence[float], new: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Count both sides by the deciles of the old one."""
    edges = np.unique(np.quantile(np.asarray(old, dtype=float), np.arange(1, BINS) / BINS))
    counts = [
        np.bincount(np.searchsorted(edges, np.asarray(values, dtype=float), side="right"), minlength=len(edges) + 1)
        for values in (old, new)
    ]
    return merge_small_bins(counts[0], counts[1])


def class_bins(old: Sequence[object], new: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Count both sides by class: the most frequent classes of the old side, and all others in one bin."""
    names, totals = np.unique(np.asarray(old), return_counts=True)
    kept = names[np.argsort(-totals, kind="stable")][: BINS - 1]
    counts = []
    for side in (old, new):
        values = np.asarray(side)
        each = [int((values == name).sum()) for name in kept]
        counts.append(np.array([*each, len(values) - sum(each)]))
    return merge_small_bins(counts[0], counts[1])


def merge_small_bins(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge each bin that has too few samples with the previous one."""
    pairs: list[list[int]] = []
    for a, b in zip(old.tolist(), new.tolist(), strict=True):
        if pairs and (a + b < MIN_BIN_COUNT or sum(pairs[-1]) < MIN_BIN_COUNT):
            pairs[-1] = [pairs[-1][0] + a, pairs[-1][1] + b]
        else:
            pairs.append([a, b])
    return np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])


def largest_change(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Return the old and the new share of the bin that changed most."""
    p, q = old / old.sum(), new / new.sum()
    changed_most = int(np.argmax(np.abs(p - q)))
    return float(p[changed_most]), float(q[changed_most])


def bad_rating_increase(old: Sequence[bool], new: Sequence[bool]) -> tuple[float, float]:
    """Return the increase of the share of bad ratings, and the p-value of Fisher's one-sided test for it."""
    table = [[sum(new), len(new) - sum(new)], [sum(old), len(old) - sum(old)]]
    return float(np.mean(new) - np.mean(old)), float(stats.fisher_exact(table, alternative="greater").pvalue)

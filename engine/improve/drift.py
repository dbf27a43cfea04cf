"""Whether what comes in differs from what a model was made for, by more than chance.

A measure has drifted where the difference is both large enough to matter and too large for chance, with as many tests as
there are measures (Bonferroni). Sizes are population stability indices (PSI): the sum over bins of (p - q) ln(p / q), the
symmetric divergence of Jeffreys 1946; 0.1 and 0.25 are its customary marks of a moderate and a large shift (Siddiqi 2006,
"Credit Risk Scorecards"). With n and m samples in B bins and nothing changed it is about (1/n + 1/m) times a chi-square of
B - 1 degrees of freedom (Yurdakul & Naranjo 2020, "Statistical properties of the population stability index", Journal of
Risk Model Validation 14): this gives its p-value. Ratings are compared by Fisher's exact test, one-sided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BINS = 10
MIN_BIN_COUNT = 5  # samples that a bin of both together must have, or it is joined to its neighbour


@dataclass(frozen=True)
class RequestStats:
    """What is measured of some requests; a measure that doesn't apply is empty."""

    lengths: Sequence[float]  # tokens of each input
    tokens: Sequence[int]  # the inputs' tokens, in a row
    confidence: Sequence[float]  # probability of each answer; of a text, the geometric mean of its tokens'
    labels: Sequence[str]  # that were answered
    bad: Sequence[bool]  # of each rating, whether it is bad


@dataclass(frozen=True)
class Drift:
    """One measure, then and now."""

    measure: str
    before: float  # mean; of labels and tokens: the share of the class (bin) that changed most
    after: float
    effect_size: float  # PSI; of ratings: the difference of the shares of bad ones
    p_value: float
    is_drift: bool
    num_samples: tuple[int, int]


def measure_drift(reference: RequestStats, recent: RequestStats, least_psi: float, least_bad: float, significance: float) -> list[Drift]:
    """Compare each measure that both have enough of. A real drift is `least_psi` (ratings: `least_bad`) at least."""
    found = []
    names = [name for name in ("lengths", "tokens", "confidence", "labels", "bad") if len(getattr(reference, name)) and len(getattr(recent, name))]  # fmt: skip
    for name in names:
        old, new = getattr(reference, name), getattr(recent, name)
        if name == "bad":
            size, p = bad_rating_increase(old, new)
            before, after, least = float(np.mean(old)), float(np.mean(new)), least_bad
        else:
            numeric = name in ("lengths", "confidence")
            bins = numeric_bins(old, new) if numeric else class_bins(old, new)
            # The tokens of one text come together, so that a text counts as one draw.
            draws = (len(reference.lengths), len(recent.lengths)) if name == "tokens" else (len(old), len(new))
            size, p = psi(*bins, draws)
            before, after = (float(np.mean(old)), float(np.mean(new))) if numeric else largest_change(*bins)
            least = least_psi
        real = size >= least and p < significance / len(names)
        found.append(Drift(name, before, after, size, p, real, (len(old), len(new))))
    return found


def psi(old: np.ndarray, new: np.ndarray, draws: tuple[int, int]) -> tuple[float, float]:
    """Return the index of two histograms (counts) and its p-value; half a sample is added to each bin, so that none is empty."""
    p, q = (old + 0.5) / (old + 0.5).sum(), (new + 0.5) / (new + 0.5).sum()
    size = float(((p - q) * np.log(p / q)).sum())
    scale = 1 / draws[0] + 1 / draws[1]
    return size, float(stats.chi2.sf(size / scale, max(len(old) - 1, 1)))


def numeric_bins(old: Sequence[float], new: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Count both in the deciles of the old ones."""
    edges = np.unique(np.quantile(np.asarray(old, dtype=float), np.arange(1, BINS) / BINS))
    counts = [np.bincount(np.searchsorted(edges, np.asarray(it, dtype=float), side="right"), minlength=len(edges) + 1) for it in (old, new)]  # fmt: skip
    return merge_small_bins(counts[0], counts[1])


def class_bins(old: Sequence[object], new: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Count both by class, the most frequent ones of the old apart and all others together."""
    names, totals = np.unique(np.asarray(old), return_counts=True)
    kept = names[np.argsort(-totals, kind="stable")][: BINS - 1]
    counts = []
    for it in (old, new):
        values = np.asarray(it)
        each = [int((values == name).sum()) for name in kept]
        counts.append(np.array([*each, len(values) - sum(each)]))
    return merge_small_bins(counts[0], counts[1])


def merge_small_bins(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join each bin that has too few samples to the one before it."""
    pairs: list[list[int]] = []
    for a, b in zip(old.tolist(), new.tolist(), strict=True):
        if pairs and (a + b < MIN_BIN_COUNT or sum(pairs[-1]) < MIN_BIN_COUNT):
            pairs[-1] = [pairs[-1][0] + a, pairs[-1][1] + b]
        else:
            pairs.append([a, b])
    return np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])


def largest_change(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Return the shares, then and now, of the bin that changed most."""
    p, q = old / old.sum(), new / new.sum()
    most = int(np.argmax(np.abs(p - q)))
    return float(p[most]), float(q[most])


def bad_rating_increase(old: Sequence[bool], new: Sequence[bool]) -> tuple[float, float]:
    """Return by how much the share of bad ratings has grown, and the p-value of Fisher's test that it has."""
    table = [[sum(new), len(new) - sum(new)], [sum(old), len(old) - sum(old)]]
    return float(np.mean(new) - np.mean(old)), float(stats.fisher_exact(table, alternative="greater").pvalue)

"""How sure a metric is: percentile bootstrap over examples (Efron & Tibshirani 1993, chapters 13 and 16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from engine.errors import UserError
from engine.objectives.contract import Objective, Scores


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return {"value", "low", "high"}."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Whether model A is better than model B on the same examples, by the objective's metric."""

    metric: str
    difference: float  # A - B
    low: float
    high: float
    verdict: str  # A is "better" or "worse" than B, or they are "not told apart"


Summarize = Callable[[Scores], dict[str, float]]  # from the scores of some examples to metrics, in microseconds


def bootstrap_intervals(summarize: Summarize, scores: Scores, confidence: float, resamples: int, seed: int) -> dict[str, Interval]:
    """Return each metric of the scores with its interval at `confidence` (0.95: 95 %).

    Raises UserError where there is no example.
    """
    drawn = [summarize(select(scores, pick)) for pick in resample_indices(num_examples(scores), resamples, seed)]
    found = {}
    for name, value in summarize(scores).items():
        low, high = np.quantile([draw[name] for draw in drawn], quantile_levels(confidence))
        found[name] = Interval(value, float(low), float(high))
    return found


def compare_paired(objective: Objective, a: Scores, b: Scores, confidence: float, resamples: int, seed: int) -> Comparison:
    """Compare two models by the paired bootstrap: each resample draws the same examples for both.

    Raises UserError where the two were not measured on the same number of examples.
    """
    if num_examples(a) != num_examples(b):
        raise UserError(
            f"the two bundles were not measured on the same examples ({num_examples(a):,} and {num_examples(b):,}): evaluate both on the same data"
        )

    def difference(pick: np.ndarray | slice) -> float:
        return objective.summarize(select(a, pick))[metric] - objective.summarize(select(b, pick))[metric]

    metric = objective.metric
    drawn = [difference(pick) for pick in resample_indices(num_examples(a), resamples, seed)]
    low, high = (float(edge) for edge in np.quantile(drawn, quantile_levels(confidence)))
    return Comparison(metric, difference(slice(None)), low, high, classify_difference(low, high, objective.mode))


def unpaired_differences(summarize: Summarize, a: Scores, b: Scores, confidence: float, resamples: int, seed: int) -> dict[str, Interval]:
    """Return each metric of A minus that of B, two groups of different examples, each drawn by itself."""
    drawn = []
    for pick_a, pick_b in zip(resample_indices(num_examples(a), resamples, seed), resample_indices(num_examples(b), resamples, seed + 1), strict=True):
        one, other = summarize(select(a, pick_a)), summarize(select(b, pick_b))
        drawn.append({name: one[name] - other[name] for name in one})
    found, one, other = {}, summarize(a), summarize(b)
    for name in one:
        low, high = np.quantile([draw[name] for draw in drawn], quantile_levels(confidence))
        found[name] = Interval(one[name] - other[name], float(low), float(high))
    return found


def classify_difference(low: float, high: float, mode: str) -> str:
    """Judge an interval of A - B: one that holds zero tells nothing apart. `mode` is the metric's, min or max."""
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (low > 0) == (mode == "max") else "worse"


def resample_indices(examples: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `resamples` draws of `examples` indices with replacement, one at a time: all at once they need gigabytes."""
    if examples == 0:
        raise UserError("there is no example to evaluate on: choose another evaluate.split or give more data")
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(examples, size=examples, dtype=np.int32)


def select(scores: Scores, pick: np.ndarray | slice) -> Scores:
    """Return the scores of some examples."""
    return {name: values[pick] for name, values in scores.items()}


def num_examples(scores: Scores) -> int:
    """Return the number of examples scored."""
    return len(next(iter(scores.values())))


def quantile_levels(confidence: float) -> tuple[float, float]:
    """Return the two quantiles that a share of `confidence` lies between."""
    return (1 - confidence) / 2, (1 + confidence) / 2

"""Confidence intervals by the percentile bootstrap over examples (Efron & Tibshirani 1993, chapters 13 and 16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from engine.errors import UserError
from engine.objectives.contract import Objective, Scores

# Verdicts, as evaluation.json spells them
BETTER, WORSE, INCONCLUSIVE = "better", "worse", "not told apart"


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return {"value", "low", "high"}."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """The comparison of models A and B on the same examples, by the objective's metric."""

    metric: str
    difference: float  # A - B
    low: float
    high: float
    verdict: str  # BETTER, WORSE or INCONCLUSIVE: A against B


Summarize = Callable[[Scores], dict[str, float]]  # scores of some examples -> metrics; runs on each resample


def bootstrap_intervals(
    summarize: Summarize, scores: Scores, confidence: float, resamples: int, seed: int
) -> dict[str, Interval]:
    """Return each metric of the scores with its interval at a confidence level (0.95: 95 %).

    Raises UserError if there are no examples.
    """
    draws = [summarize(select(scores, indices)) for indices in resample_indices(num_examples(scores), resamples, seed)]
    return _intervals(summarize(scores), draws, confidence)


def compare_paired(
    objective: Objective, a: Scores, b: Scores, confidence: float, resamples: int, seed: int
) -> Comparison:
    """Compare two models by the paired bootstrap: each resample takes the same examples of both.

    Raises UserError if the two were scored on different numbers of examples.
    """
    if num_examples(a) != num_examples(b):
        raise UserError(
            f"the two bundles were not scored on the same examples ({num_examples(a):,} and {num_examples(b):,}): "
            "evaluate both on the same data"
        )
    metric = objective.metric

    def difference(indices: np.ndarray | slice) -> float:
        return objective.summarize(select(a, indices))[metric] - objective.summarize(select(b, indices))[metric]

    draws = [difference(indices) for indices in resample_indices(num_examples(a), resamples, seed)]
    low, high = (float(edge) for edge in np.quantile(draws, quantile_levels(confidence)))
    return Comparison(metric, difference(slice(None)), low, high, classify_difference(low, high, objective.mode))


def unpaired_differences(
    summarize: Summarize, a: Scores, b: Scores, confidence: float, resamples: int, seed: int
) -> dict[str, Interval]:
    """Return each metric of A minus that of B, where A and B are different examples, resampled independently."""
    resamples_a = resample_indices(num_examples(a), resamples, seed)
    resamples_b = resample_indices(num_examples(b), resamples, seed + 1)
    draws = [
        _difference(summarize(select(a, indices_a)), summarize(select(b, indices_b)))
        for indices_a, indices_b in zip(resamples_a, resamples_b, strict=True)
    ]
    return _intervals(_difference(summarize(a), summarize(b)), draws, confidence)


def classify_difference(low: float, high: float, mode: str) -> str:
    """Return the verdict for an interval of A - B: INCONCLUSIVE if it holds zero. `mode` is the metric's, min or max."""
    if low <= 0 <= high:
        return INCONCLUSIVE
    return BETTER if (low > 0) == (mode == "max") else WORSE


def resample_indices(examples: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `resamples` arrays of `examples` indices drawn with replacement; all arrays at once would take gigabytes."""
    if examples == 0:
        raise UserError("there are no examples to evaluate on: choose another evaluate.split or more data")
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(examples, size=examples, dtype=np.int32)


def select(scores: Scores, indices: np.ndarray | slice) -> Scores:
    """Return the scores of some examples."""
    return {name: values[indices] for name, values in scores.items()}


def num_examples(scores: Scores) -> int:
    """Return the number of examples scored."""
    return len(next(iter(scores.values())))


def quantile_levels(confidence: float) -> tuple[float, float]:
    """Return the two quantiles between which a fraction `confidence` of the resamples lies."""
    return (1 - confidence) / 2, (1 + confidence) / 2


def _difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a[name] - b[name] for name in a}


def _intervals(values: dict[str, float], draws: list[dict[str, float]], confidence: float) -> dict[str, Interval]:
    intervals = {}
    for name, value in values.items():
        low, high = np.quantile([draw[name] for draw in draws], quantile_levels(confidence))
        intervals[name] = Interval(value, float(low), float(high))
    return intervals

"""How sure a metric is: percentile bootstrap over examples (Efron & Tibshirani 1993, chapter 13)."""

from __future__ import annotations

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


def _resampled(objective: Objective, scores: Scores, picks: np.ndarray) -> list[dict[str, float]]:
    return [objective.summarize({name: values[pick] for name, values in scores.items()}) for pick in picks]


def _picks(examples: int, resamples: int, seed: int) -> np.ndarray:
    """Return indices [resamples, examples], drawn with replacement."""
    if examples == 0:
        raise UserError("there is no example to evaluate on: choose another evaluate.split or give more data")
    return np.random.default_rng(seed).integers(examples, size=(resamples, examples))


def intervals(
    objective: Objective, scores: Scores, confidence: float, resamples: int, seed: int
) -> dict[str, Interval]:
    """Return each metric of the scores with its interval at `confidence` (0.95: 95 %)."""
    examples = len(next(iter(scores.values())))
    values = objective.summarize(scores)
    drawn = _resampled(objective, scores, _picks(examples, resamples, seed))
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    found = {}
    for name, value in values.items():
        low, high = np.quantile([draw[name] for draw in drawn], edges)
        found[name] = Interval(value, float(low), float(high))
    return found


def compare(objective: Objective, a: Scores, b: Scores, confidence: float, resamples: int, seed: int) -> Comparison:
    """Compare two models by the paired bootstrap: each resample draws the same examples for both."""
    examples = len(next(iter(a.values())))
    if examples != len(next(iter(b.values()))):
        raise UserError("the two bundles were not measured on the same examples: evaluate both on the same data")
    picks, metric = _picks(examples, resamples, seed), objective.metric
    pairs = zip(_resampled(objective, a, picks), _resampled(objective, b, picks), strict=True)
    low, high = np.quantile([x[metric] - y[metric] for x, y in pairs], [(1 - confidence) / 2, (1 + confidence) / 2])
    sign = 1 if objective.mode == "max" else -1
    verdict = (
        "better"
        if min(sign * low, sign * high) > 0
        else "worse"
        if max(sign * low, sign * high) < 0
        else "not told apart"
    )
    difference = objective.summarize(a)[metric] - objective.summarize(b)[metric]
    return Comparison(metric, difference, float(low), float(high), verdict)

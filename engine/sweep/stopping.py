"""Stopping rules, which end trials early by what all trials have reported, and the rungs of successive halving. No Ray."""

from __future__ import annotations

import statistics
from collections import defaultdict

from engine.config import Config


class StoppingRule:
    """Never stops a trial; the base class of rules. A rule gets every report, in the order in which they arrive."""

    def __init__(self, mode: str) -> None:
        """`mode`: whether the smallest ("min") or the largest ("max") value is best."""
        self.mode, self._sign = mode, 1.0 if mode == "min" else -1.0

    def should_stop(self, index: int, step: int, value: float) -> bool:
        """Record that trial `index` has `value` after `step` steps; return whether to stop it."""
        return False


class MedianStoppingRule(StoppingRule):
    """Stops a trial whose best value is worse than the median of the other trials' means up to its step.

    Golovin et al. 2017 (Vizier), https://dl.acm.org/doi/10.1145/3097983.3098043.
    """

    def __init__(self, mode: str, grace_steps: int, min_trials: int = 3) -> None:
        """Stop no trial before `grace_steps` steps, or before `min_trials` other trials have reached its step."""
        super().__init__(mode)
        self._grace_steps, self._min_trials = grace_steps, min_trials
        self._costs: dict[int, dict[int, float]] = defaultdict(dict)  # trial -> step -> cost

    def should_stop(self, index: int, step: int, value: float) -> bool:
        """Compare the trial with those that have reached its step."""
        self._costs[index][step] = self._sign * value
        means = [
            statistics.mean(cost for at, cost in costs.items() if at <= step)
            for other, costs in self._costs.items()
            if other != index and max(costs) >= step
        ]
        if step < self._grace_steps or len(means) < self._min_trials:
            return False
        return min(self._costs[index].values()) > statistics.median(means)


def grace_steps(config: Config) -> int:
    """Return the number of steps that every trial may take."""
    return config.sweep.grace_steps or max(1, config.train.max_steps // config.sweep.reduction_factor**2)


def rungs(config: Config) -> list[int]:
    """Return the steps of the rungs: the grace period, times `reduction` for each further rung, below the budget."""
    steps, step = [], grace_steps(config)
    while step < config.train.max_steps:
        steps.append(step)
        step *= config.sweep.reduction_factor
    return steps


def make_stopping_rule(config: Config, mode: str) -> StoppingRule:
    """Return the stopping rule of sweep.scheduler."""
    return MedianStoppingRule(mode, grace_steps(config)) if config.sweep.scheduler == "median" else StoppingRule(mode)

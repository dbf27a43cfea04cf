"""When a trial is stopped early: rules over what the trials have reported. No Ray in it, so each is tested by tables."""

from __future__ import annotations

import statistics
from collections import defaultdict

from engine.config import Config


class StoppingRule:
    """Never stops one. The others are told every report, in the order in which they come."""

    def __init__(self, mode: str) -> None:
        """`mode`: whether the least ("min") or the greatest ("max") value is best."""
        self.mode, self._sign = mode, 1.0 if mode == "min" else -1.0

    def stops(self, index: int, step: int, value: float) -> bool:
        """Hear that the trial `index` has `value` after `step` steps; return whether it ends with that."""
        return False


class MedianStoppingRule(StoppingRule):
    """Stops a trial whose best is worse than the median of the others' means up to its step (Golovin et al. 2017, Vizier)."""

    def __init__(self, mode: str, grace: int, least: int = 3) -> None:
        """Judge after `grace` steps, where `least` other trials have come as far."""
        super().__init__(mode)
        self._grace, self._least = grace, least
        self._costs: dict[int, dict[int, float]] = defaultdict(dict)  # trial -> step -> cost

    def stops(self, index: int, step: int, value: float) -> bool:
        """Judge the trial by those that have come as far."""
        self._costs[index][step] = self._sign * value
        means = [
            statistics.mean(cost for at, cost in costs.items() if at <= step)
            for other, costs in self._costs.items()
            if other != index and max(costs) >= step
        ]
        if step < self._grace or len(means) < self._least:
            return False
        return min(self._costs[index].values()) > statistics.median(means)


def grace_steps(config: Config) -> int:
    """Return the steps that every trial may take."""
    return config.sweep.grace_steps or max(1, config.train.max_steps // config.sweep.reduction**2)


def rungs(config: Config) -> list[int]:
    """Return the steps at which trials are judged: the grace period, and then `reduction` times as many each."""
    found, step = [], grace_steps(config)
    while step < config.train.max_steps:
        found.append(step)
        step *= config.sweep.reduction
    return found


def make_stopping_rule(config: Config, mode: str) -> StoppingRule:
    """Return the rule of sweep.scheduler."""
    return MedianStoppingRule(mode, grace_steps(config)) if config.sweep.scheduler == "median" else StoppingRule(mode)

"""When a trial is stopped early: rules over what the trials have reported. No Ray in it, so each is tested by tables."""

from __future__ import annotations

import statistics
from collections import defaultdict

from engine.config import Config

MOST_BRACKETS = 4  # hyperband: more would leave most trials unstopped


class Rule:
    """Never stops one. The others are told every report, in the order in which they come."""

    def __init__(self, mode: str) -> None:
        """`mode`: whether the least ("min") or the greatest ("max") value is best."""
        self.mode, self._sign = mode, 1.0 if mode == "min" else -1.0

    def stops(self, index: int, step: int, value: float) -> bool:
        """Hear that the trial `index` has `value` after `step` steps; return whether it ends with that."""
        return False


class Asha(Rule):
    """Asynchronous successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934), which stops at once.

    At each rung a trial goes on if it is among the best `1 / reduction` of those that have come to it. With several
    brackets (hyperband, section 3.3 there), the trials take turns in them; each begins one rung later than the one before.
    """

    def __init__(self, mode: str, rungs: list[int], reduction: int, brackets: int = 1) -> None:
        """Judge at the `rungs` (steps, ascending), in `brackets` of which each leaves out one rung more."""
        super().__init__(mode)
        self._rungs, self._reduction, self._brackets = rungs, reduction, brackets
        self._costs: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)  # (bracket, rung) -> trial -> cost

    def stops(self, index: int, step: int, value: float) -> bool:
        """Judge the trial at every rung that it has come to since its last report."""
        bracket, stop = index % self._brackets, False
        for rung in self._rungs[bracket:]:
            known = self._costs[bracket, rung]
            if step >= rung and index not in known:
                known[index] = self._sign * value
                allowed = max(1, len(known) // self._reduction)
                stop = stop or known[index] > sorted(known.values())[allowed - 1]
        return stop


class Median(Rule):
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


def make_rule(config: Config, mode: str) -> Rule:
    """Return the rule of sweep.scheduler."""
    sweep, steps = config.sweep, rungs(config)
    if sweep.scheduler == "asha":
        return Asha(mode, steps, sweep.reduction)
    if sweep.scheduler == "hyperband":
        return Asha(mode, steps, sweep.reduction, brackets=min(MOST_BRACKETS, len(steps) + 1))
    if sweep.scheduler == "median":
        return Median(mode, grace_steps(config))
    return Rule(mode)

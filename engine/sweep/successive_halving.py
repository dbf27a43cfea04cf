"""Asynchronous successive halving: a trial waits at each rung, and goes on once it is among the best that have come to it.

Li et al. 2020, https://arxiv.org/abs/1810.05934 (algorithm 2, and section 3.3: hyperband, which has several brackets, each
beginning one rung later than the one before; the trials take turns in them). Unlike the kind that judges a trial as it comes,
and lets the first ones pass, it spends no steps on trials that are merely early. A trial goes on from its checkpoint, bit for
bit. Where all of a bracket wait and too few have come to the end, the best goes on. No Ray in it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.sweep import trial_record
from engine.sweep.search_algorithm import IndependentTrials, PlaceTrial
from engine.sweep.searchers import Searcher
from engine.sweep.stopping import StoppingRule
from engine.sweep.trial_record import PAUSED, Trial
from engine.train.run_folder import RunFolder

MAX_BRACKETS = 4  # hyperband: more would leave most trials unstopped


class SuccessiveHalving(IndependentTrials):
    """Trials that train from rung to rung."""

    in_parts = True

    def __init__(
        self, config: Config, folder: Path, metrics: Sequence[str], searcher: Searcher, mode: str, place: PlaceTrial,
        rungs: Sequence[int],
    ) -> None:  # fmt: skip
        """Begin, or go on with the trials whose records are in `folder`; `rungs`: steps, ascending, below the budget."""
        self._reduction, self._wanted = config.sweep.reduction, config.sweep.soup or 1
        brackets = min(MAX_BRACKETS, len(rungs) + 1) if config.sweep.scheduler == "hyperband" else 1
        self._rungs = [list(rungs[bracket:]) for bracket in range(brackets)]
        super().__init__(config, folder, metrics, searcher, StoppingRule(mode), place)

    @property
    def done(self) -> bool:
        """Whether every trial is over."""
        return len(self.trials) == self.total and all(trial.over for trial in self.trials.values())

    def next(self) -> dict[str, Any] | None:
        """Return the task of a trial that goes on to its next rung, or else of a new one; None where it must wait."""
        brackets = range(len(self._rungs))
        if (trial := next((found for bracket in brackets for found in self._ready(bracket)), None)) is None:
            if (task := super().next()) is not None:
                return task
            trial = next((found for bracket in brackets if (found := self._last_hope(bracket))), None)
        if trial is None:
            return None
        trial.state, self._began[trial.index] = "running", time.monotonic()
        return self._task(trial, *self._place(trial.params))

    def end(self, index: int, reason: str | None) -> None:
        """Note how a trial came to its rung, and end those that can go no further."""
        super().end(index, reason)
        for bracket in range(len(self._rungs)):
            for trial in self._hopeless(bracket):
                trial.state = "stopped early"
                trial_record.write_trial(self._folder / trial.name, trial)
                shutil.rmtree(RunFolder(self._folder / trial.name).checkpoints, ignore_errors=True)

    def _until(self, trial: Trial) -> int:
        rungs = self._rungs[trial.index % len(self._rungs)]
        return next((rung for rung in rungs if rung > trial.steps), trial.budget)

    def _ended(self, trial: Trial) -> str:
        return PAUSED if trial.steps < trial.budget else "finished"

    def _of(self, bracket: int) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.index % len(self._rungs) == bracket]

    def _come(self, bracket: int, rung: int) -> list[Trial]:
        """Return the trials that have come to a rung, the best there first; of equal ones the earlier."""
        sign = 1.0 if self._rule.mode == "min" else -1.0
        found = []
        for trial in self._of(bracket):
            value = next((value for step, value in trial.curve if step >= rung), None)
            if value is not None and trial.state != "failed":
                found.append((sign * value, trial.index))
        return [self.trials[index] for _, index in sorted(found)]

    def _ready(self, bracket: int) -> list[Trial]:
        """Return the trials that may go on, those of the highest rung first."""
        found = []
        for rung in reversed(self._rungs[bracket]):
            come = self._come(bracket, rung)
            found += [trial for trial in come[: len(come) // self._reduction] if is_paused_at(trial, rung)]
        return found

    def _last_hope(self, bracket: int) -> Trial | None:
        """Return who goes on although too few have come to its rung, where all others wait and too few have ended."""
        if self._moves(bracket) or self._enough(bracket):
            return None
        rungs = reversed(self._rungs[bracket])
        return next((trial for rung in rungs for trial in self._come(bracket, rung) if is_paused_at(trial, rung)), None)

    def _hopeless(self, bracket: int) -> list[Trial]:
        """Return those that wait in vain: the bracket is through, or too many are better, also should half of these fail."""
        through = self._enough(bracket) and not self._moves(bracket) and not self._ready(bracket)
        size, found = len(range(bracket, self.total, len(self._rungs))), []
        for place, rung in enumerate(self._rungs[bracket], 1):
            most = 0 if through else 2 * max(self._wanted, size // self._reduction**place)
            found += [trial for trial in self._come(bracket, rung)[most:] if is_paused_at(trial, rung)]
        return found

    def _moves(self, bracket: int) -> bool:
        """Tell whether more trials are to come to a rung of themselves."""
        return len(self.trials) < self.total or any(trial.state == "running" for trial in self._of(bracket))

    def _enough(self, bracket: int) -> bool:
        return sum(trial.state == "finished" for trial in self._of(bracket)) >= self._wanted


def is_paused_at(trial: Trial, rung: int) -> bool:
    """Tell whether a trial waits at a rung."""
    return trial.state == PAUSED and trial.steps == rung

"""Asynchronous successive halving (ASHA) and Hyperband: a trial pauses at each rung until it is among the best there.

Li et al. 2020, https://arxiv.org/abs/1810.05934: algorithm 2, and section 3.3 for Hyperband, which has several brackets,
each with one rung fewer than the one before; trials are assigned to brackets round-robin. Unlike the variant that decides
when a trial reports, and promotes the first ones, this one spends no steps on trials that are merely early. A paused trial
resumes from its checkpoint, bit for bit. If all trials of a bracket are paused and too few have finished, the best resumes.
Uses no Ray.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from engine.config import Config
from engine.sweep.search_algorithm import IndependentTrials, PlaceTrial
from engine.sweep.searchers import Searcher
from engine.sweep.stopping import StoppingRule
from engine.sweep.trial_record import PAUSED, Trial, TrialTask, write_trial
from engine.train.run_folder import RunFolder

MAX_BRACKETS = 4  # Hyperband: with more, most trials would never be stopped


class SuccessiveHalving(IndependentTrials):
    """Trials that train from rung to rung."""

    has_partial_tasks = True

    def __init__(
        self, config: Config, folder: Path, metrics: Sequence[str], searcher: Searcher, mode: str, place_trial: PlaceTrial,
        rungs: Sequence[int],
    ) -> None:  # fmt: skip
        """Start, or resume with the trials whose records are in `folder`; `rungs`: steps, ascending, below the budget."""
        self._reduction, self._num_winners = config.sweep.reduction_factor, config.sweep.soup or 1
        brackets = min(MAX_BRACKETS, len(rungs) + 1) if config.sweep.scheduler == "hyperband" else 1
        self._rungs = [list(rungs[bracket:]) for bracket in range(brackets)]
        super().__init__(config, folder, metrics, searcher, StoppingRule(mode), place_trial)

    @property
    def is_done(self) -> bool:
        """Whether every trial is over."""
        return len(self.trials) == self.total and all(trial.is_over for trial in self.trials.values())

    def next_task(self) -> TrialTask | None:
        """Return the task of a promoted trial, else of a new one; None if it depends on running trials."""
        brackets = range(len(self._rungs))
        promoted = (trial for bracket in brackets for trial in self._promotable(bracket))
        if (trial := next(promoted, None)) is None:
            if (task := super().next_task()) is not None:
                return task
            trial = next((best for bracket in brackets if (best := self._best_of_all_paused(bracket))), None)
        if trial is None:
            return None
        trial.state, self._started_at[trial.index] = "running", time.monotonic()
        return self._make_task(trial, *self._place_trial(trial.params))

    def on_end(self, index: int, error: str | None) -> None:
        """Record a trial at its rung, and stop paused trials that can no longer be promoted."""
        super().on_end(index, error)
        for bracket in range(len(self._rungs)):
            for trial in self._hopeless(bracket):
                trial.state = "stopped early"
                write_trial(self._folder / trial.name, trial)
                shutil.rmtree(RunFolder(self._folder / trial.name).checkpoints, ignore_errors=True)

    def _end_step(self, trial: Trial) -> int:
        rungs = self._rungs[trial.index % len(self._rungs)]
        return next((rung for rung in rungs if rung > trial.steps), trial.budget)

    def _end_state(self, trial: Trial) -> str:
        return PAUSED if trial.steps < trial.budget else "finished"

    def _trials_of(self, bracket: int) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.index % len(self._rungs) == bracket]

    def _ranked_at(self, bracket: int, rung: int) -> list[Trial]:
        """Return the trials that have reached a rung, the best there first; equal ones by index."""
        sign = 1.0 if self._rule.mode == "min" else -1.0
        ranked = []
        for trial in self._trials_of(bracket):
            value = next((value for step, value in trial.curve if step >= rung), None)
            if value is not None and trial.state != "failed":
                ranked.append((sign * value, trial.index))
        return [self.trials[index] for _, index in sorted(ranked)]

    def _promotable(self, bracket: int) -> list[Trial]:
        """Return the paused trials in the top 1/reduction of their rung, those of the highest rung first."""
        promotable = []
        for rung in reversed(self._rungs[bracket]):
            ranked = self._ranked_at(bracket, rung)
            promotable += [trial for trial in ranked[: len(ranked) // self._reduction] if is_paused_at(trial, rung)]
        return promotable

    def _best_of_all_paused(self, bracket: int) -> Trial | None:
        """Return the trial to resume although too few have reached its rung, if none runs and too few have finished."""
        if self._has_running(bracket) or self._has_enough_finished(bracket):
            return None
        rungs = reversed(self._rungs[bracket])
        paused = (t for rung in rungs for t in self._ranked_at(bracket, rung) if is_paused_at(t, rung))
        return next(paused, None)

    def _hopeless(self, bracket: int) -> list[Trial]:
        """Return the paused trials to stop: the bracket is complete, or enough are better even if half of these fail."""
        is_complete = (
            self._has_enough_finished(bracket) and not self._has_running(bracket) and not self._promotable(bracket)
        )
        size, hopeless = len(range(bracket, self.total, len(self._rungs))), []
        for number, rung in enumerate(self._rungs[bracket], 1):
            keep = 0 if is_complete else 2 * max(self._num_winners, size // self._reduction**number)
            hopeless += [trial for trial in self._ranked_at(bracket, rung)[keep:] if is_paused_at(trial, rung)]
        return hopeless

    def _has_running(self, bracket: int) -> bool:
        """Return whether more trials will reach a rung without a promotion."""
        return len(self.trials) < self.total or any(trial.state == "running" for trial in self._trials_of(bracket))

    def _has_enough_finished(self, bracket: int) -> bool:
        return sum(trial.state == "finished" for trial in self._trials_of(bracket)) >= self._num_winners


def is_paused_at(trial: Trial, rung: int) -> bool:
    """Return whether a trial is paused at a rung."""
    return trial.state == PAUSED and trial.steps == rung

"""Search algorithms: which trial runs next, what follows from its reports, and how it ends. Uses no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.config import Config
from engine.errors import UserError
from engine.sweep.searchers import Searcher
from engine.sweep.stopping import StoppingRule
from engine.sweep.trial_record import PAUSED, Trial, TrialTask, read_trial, write_trial

# params -> params with a micro-batch that fits, folder of the prepared data. Raises UserError if the trial cannot run.
PlaceTrial = Callable[[dict[str, Any]], tuple[dict[str, Any], Path]]


class SearchAlgorithm(Protocol):
    """Drives a sweep: `launch` requests tasks while it has a free slot, and reports results and ends of trials."""

    trials: dict[int, Trial]
    total: int  # number of trials
    has_partial_tasks: bool  # whether a task may be a part of a trial, with the schedule of the whole trial

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be started."""

    def next_task(self) -> TrialTask | None:
        """Return the next task; None if it depends on running trials."""

    def on_report(self, index: int, step: int, metrics: dict[str, float], process: int) -> bool:
        """Handle a trial's validation result; return whether to stop the trial."""

    def on_end(self, index: int, error: str | None) -> None:
        """Handle the end of a trial's task; `error`: the reason if it failed."""


class IndependentTrials:
    """Independent trials, some of which a stopping rule may stop early."""

    has_partial_tasks = False

    def __init__(
        self,
        config: Config,
        folder: Path,
        metrics: Sequence[str],
        searcher: Searcher,
        rule: StoppingRule,
        place_trial: PlaceTrial,
    ) -> None:
        """Start, or resume with the trials whose records are in `folder`."""
        self._config, self._folder, self._metrics = config, folder, metrics
        self._searcher, self._rule, self._place_trial = searcher, rule, place_trial
        self._started_at: dict[int, float] = {}
        self._stopped: set[int] = set()
        self.total = len(searcher)
        self.trials = self._read_trials()

    def _read_trials(self) -> dict[int, Trial]:
        """Read the records of an earlier command, and replay their curves to the stopping rule."""
        trials = {}
        for index in range(self.total):
            trial = read_trial(self._folder / trial_name(self._config, index))
            is_kept = trial and (trial.is_over or (self.has_partial_tasks and trial.state == PAUSED))
            if trial and is_kept and trial.budget == self._config.train.max_steps:
                trials[index] = trial
                for step, value in trial.curve:
                    self._rule.should_stop(index, step, value)
        return trials

    @property
    def is_done(self) -> bool:
        """Whether every trial has been started."""
        return len(self.trials) == self.total

    def next_task(self) -> TrialTask | None:
        """Return the task of the next trial; trials that cannot run are recorded as refused and skipped."""
        for index in range(self.total):
            if index not in self.trials:
                params = self._searcher.suggest_params(index, list(self.trials.values()))
                name, steps = trial_name(self._config, index), self._config.train.max_steps
                self.trials[index] = trial = Trial(index, name, params, steps)
                self._started_at[index] = time.monotonic()
                try:
                    fitting, data = self._place_trial(params)
                except UserError as error:
                    trial.state, trial.reason = "refused", str(error)
                    write_trial(self._folder / name, trial)
                    continue
                return self._make_task(trial, fitting, data)
        return None

    def _make_task(self, trial: Trial, params: dict[str, Any], data: Path) -> TrialTask:
        """Return the task that starts or continues a trial, with params that fit."""
        return TrialTask(trial.index, trial.name, params, trial.steps, self._end_step(trial), str(data))

    def _end_step(self, trial: Trial) -> int:
        """Return the last step of the trial's next task."""
        return trial.budget

    def on_report(self, index: int, step: int, metrics: dict[str, float], process: int) -> bool:
        """Handle a validation result; return whether the stopping rule stops the trial."""
        trial = self.trials[index]
        first, *others = self._metrics
        trial.record_validation(step, metrics[first], {name: metrics[name] for name in others})
        trial.process = process
        if self._rule.should_stop(index, step, metrics[first]) and step < trial.budget:
            self._stopped.add(index)
        return index in self._stopped

    def on_end(self, index: int, error: str | None) -> None:
        """Record how a trial's task ended."""
        trial = self.trials[index]
        trial.state = "failed" if error is not None else self._end_state(trial)
        trial.reason = error or ""
        trial.seconds += time.monotonic() - self._started_at[index]
        if self._config.train.keep_best and trial.state == "finished":
            best = min if self._rule.mode == "min" else max
            trial.value = best(value for _, value in trial.curve)
        write_trial(self._folder / trial.name, trial)

    def _end_state(self, trial: Trial) -> str:
        """Return the state of a trial whose task has ended without an error."""
        return "stopped early" if trial.index in self._stopped else "finished"


def trial_name(config: Config, index: int) -> str:
    """Return a trial's name: the sweep's name and the index."""
    return f"{config.name}-{index:03d}"

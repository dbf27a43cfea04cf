"""Which trial is next, what it reports, and how it ends: a search over independent trials. No Ray in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.config import Config
from engine.errors import UserError
from engine.sweep import trial_record
from engine.sweep.searchers import Searcher
from engine.sweep.stopping import StoppingRule
from engine.sweep.trial_record import PAUSED, Trial

PlaceTrial = Callable[
    [dict[str, Any]], tuple[dict[str, Any], Path]
]  # params -> those that fit, the folder of their data


class SearchAlgorithm(Protocol):
    """How a sweep goes: `launch` asks it for trials while there is room for one, and tells it what becomes of them."""

    trials: dict[int, Trial]
    total: int  # trials in all
    in_parts: bool  # whether a task may be a part of a trial, whose schedule is that of the whole

    @property
    def done(self) -> bool:
        """Whether nothing is left to be started."""

    def next(self) -> dict[str, Any] | None:
        """Return the task of the next trial; None where it must wait for others."""

    def report(self, index: int, step: int, figures: dict[str, float], process: int) -> bool:
        """Hear of a validation; return whether the trial is to end with it."""

    def end(self, index: int, reason: str | None) -> None:
        """Hear that a trial has ended, with the reason where it failed."""


class IndependentTrials:
    """Independent trials, of which a rule may stop some early."""

    in_parts = False

    def __init__(
        self,
        config: Config,
        folder: Path,
        metrics: Sequence[str],
        searcher: Searcher,
        rule: StoppingRule,
        place: PlaceTrial,
    ) -> None:
        """Begin, or go on with the trials whose records are in `folder`."""
        self._config, self._folder, self._metrics = config, folder, metrics
        self._searcher, self._rule, self._place = searcher, rule, place
        self._began: dict[int, float] = {}
        self._stopped: set[int] = set()
        self.total = len(searcher)
        self.trials = self._known()

    def _known(self) -> dict[int, Trial]:
        """Read what an earlier command has left, and tell the rule of it."""
        found = {}
        for index in range(self.total):
            trial = trial_record.read_trial(self._folder / trial_name(self._config, index))
            kept = trial and (trial.over or (self.in_parts and trial.state == PAUSED))
            if trial and kept and trial.budget == self._config.train.max_steps:
                found[index] = trial
                for step, value in trial.curve:
                    self._rule.stops(index, step, value)
        return found

    @property
    def done(self) -> bool:
        """Whether every trial has been started."""
        return len(self.trials) == self.total

    def next(self) -> dict[str, Any] | None:
        """Return the task of the next trial; those that cannot be trained at all are noted and passed over."""
        for index in range(self.total):
            if index not in self.trials:
                params = self._searcher.ask(index, list(self.trials.values()))
                name, steps = trial_name(self._config, index), self._config.train.max_steps
                self.trials[index] = trial = Trial(index, name, params, steps)
                self._began[index] = time.monotonic()
                try:
                    fitting, data = self._place(params)
                except UserError as error:
                    trial.state, trial.reason = "refused", str(error)
                    trial_record.write_trial(self._folder / name, trial)
                    continue
                return self._task(trial, fitting, data)
        return None

    def _task(self, trial: Trial, params: dict[str, Any], data: Path) -> dict[str, Any]:
        """Return the task of going on with a trial, with values that fit."""
        return {"index": trial.index, "name": trial.name, "params": params, "since": trial.steps,
                "until": self._until(trial), "data": str(data)}  # fmt: skip

    def _until(self, trial: Trial) -> int:
        """Return the step with which the trial's next task ends."""
        return trial.budget

    def report(self, index: int, step: int, figures: dict[str, float], process: int) -> bool:
        """Hear of a validation; return whether the rule stops the trial."""
        trial = self.trials[index]
        first, *others = self._metrics
        trial.hear(step, figures[first], {name: figures[name] for name in others})
        trial.process = process
        if self._rule.stops(index, step, figures[first]) and step < trial.budget:
            self._stopped.add(index)
        return index in self._stopped

    def end(self, index: int, reason: str | None) -> None:
        """Note how a trial ended."""
        trial = self.trials[index]
        trial.state = "failed" if reason is not None else self._ended(trial)
        trial.reason = reason or ""
        trial.seconds += time.monotonic() - self._began[index]
        if self._config.train.keep_best and trial.state == "finished":
            pick = min if self._rule.mode == "min" else max
            trial.value = pick(value for _, value in trial.curve)
        trial_record.write_trial(self._folder / trial.name, trial)

    def _ended(self, trial: Trial) -> str:
        """Return the state of a trial whose task has ended."""
        return "stopped early" if trial.index in self._stopped else "finished"


def trial_name(config: Config, index: int) -> str:
    """Name a trial by its sweep and its index."""
    return f"{config.name}-{index:03d}"

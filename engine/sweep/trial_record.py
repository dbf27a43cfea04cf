"""Trials of a sweep: the task of training one, and its record, which is written to the trial's folder when it has ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.atomic_write import write_atomically

RECORD_FILE = "trial.json"
PAUSED = "paused"  # the state of a trial that waits at a rung for other trials
FINAL_STATES = ("finished", "stopped early", "failed", "refused")


@dataclass(frozen=True)
class TrialTask:
    """A part of a trial, or all of it, to be trained by a worker. Ray Tune carries it there as the trial's config."""

    index: int
    name: str
    params: dict[str, Any]  # dotted key -> value
    start_step: int  # the trial's step before the task
    end_step: int
    data_folder: str  # of the prepared data


@dataclass
class Trial:
    """The record of one trial: its params, state and results."""

    index: int
    name: str
    params: dict[str, Any]
    budget: int = 0  # steps of the whole trial
    steps: int = 0  # steps done
    value: float | None = None  # of the sweep's first metric, at the last report
    others: dict[str, float] = field(default_factory=dict)  # further metrics, at the last report
    state: str = "running"  # or PAUSED, or one of FINAL_STATES; refused: it never ran
    reason: str = ""  # why it failed or was refused
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, first metric)
    seconds: float = 0.0  # of training
    process: int = 0  # id of the process that trained it last
    losses: int = 0  # times that a worker was lost and the trial restarted

    @property
    def is_over(self) -> bool:
        """Whether the trial will not run again."""
        return self.state in FINAL_STATES

    @property
    def has_result(self) -> bool:
        """Whether it finished with a finite value."""
        return self.state == "finished" and self.value is not None and math.isfinite(self.value)

    def record_validation(self, step: int, value: float, others: dict[str, float]) -> None:
        """Add a validation result; one that is repeated after a restart replaces the former."""
        self.curve = [(s, v) for s, v in self.curve if s < step] + [(step, value)]
        self.steps, self.value, self.others = step, value, others


def write_trial(folder: Path, trial: Trial) -> None:
    """Write a trial's record atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD_FILE, json.dumps(asdict(trial)))


def read_trial(folder: Path) -> Trial | None:
    """Return the record in a trial's folder; None for a trial that is neither over nor paused."""
    file = folder / RECORD_FILE
    return trial_from_dict(json.loads(file.read_text())) if file.exists() else None


def trial_from_dict(tree: dict[str, Any]) -> Trial:
    """Return the trial whose `asdict` this is."""
    return Trial(**tree | {"curve": [(step, value) for step, value in tree["curve"]]})


def best_first(trials: Iterable[Trial], mode: str) -> list[Trial]:
    """Return the trials with a result, the best first; equal ones by index."""
    sign = 1 if mode == "min" else -1
    return sorted(
        (trial for trial in trials if trial.has_result), key=lambda trial: (sign * (trial.value or 0.0), trial.index)
    )


def current_best(trials: Iterable[Trial], mode: str) -> Trial | None:
    """Return the best trial with a result; if there is none, the best of the paused trials with the most steps."""
    known = list(trials)
    if best := best_first(known, mode):
        return best[0]
    paused = [trial for trial in known if trial.state == PAUSED and trial.value is not None]
    farthest = [trial for trial in paused if trial.steps == max(trial.steps for trial in paused)]
    sign = 1 if mode == "min" else -1
    return min(farthest, key=lambda trial: (sign * (trial.value or 0.0), trial.index), default=None)


def pareto_front(trials: Iterable[Trial], metrics: list[str], modes: list[str]) -> list[Trial]:
    """Return the finished trials that no other trial dominates (at least as good in all metrics, and better in one)."""
    signs = [1 if mode == "min" else -1 for mode in modes]
    finished = best_first(trials, modes[0])
    costs = {
        trial.index: [signs[0] * (trial.value or 0.0)]
        + [sign * trial.others[name] for sign, name in zip(signs[1:], metrics[1:], strict=True)]
        for trial in finished
    }

    def is_dominated(trial: Trial) -> bool:
        own = costs[trial.index]
        return any(all(a <= b for a, b in zip(other, own)) and other != own for other in costs.values())

    return [trial for trial in finished if not is_dominated(trial)]

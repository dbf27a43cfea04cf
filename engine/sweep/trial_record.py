"""What became of each trial of a sweep: kept in its own folder as soon as it is over, so that nothing is done twice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.atomic_write import write_atomically

RECORD = "trial.json"
PAUSED = "paused"  # the state of a trial that waits for others to come as far
FINAL_STATES = ("finished", "stopped early", "failed", "refused")


@dataclass
class Trial:
    """One trial: what differs in it, and how it went."""

    index: int
    name: str
    params: dict[str, Any]
    budget: int = 0  # steps that it was to take
    steps: int = 0  # steps that it took
    value: float | None = None  # of the sweep's first metric, at the last report
    others: dict[str, float] = field(default_factory=dict)  # the further metrics, at the last report
    state: str = "running"  # or PAUSED; then one of OVER; refused: no process ever had it
    reason: str = ""  # why it failed or was refused
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, metric)
    seconds: float = 0.0  # from its start to its end
    process: int = 0  # that trained it last
    losses: int = 0  # times that a process of its was lost, after which it was begun again

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.state in FINAL_STATES

    @property
    def usable(self) -> bool:
        """Whether it came to its end with a finite figure."""
        return self.state == "finished" and self.value is not None and math.isfinite(self.value)

    def hear(self, step: int, value: float, others: dict[str, float]) -> None:
        """Note a validation; one that was taken again after a kill counts once."""
        self.curve = [(s, v) for s, v in self.curve if s < step] + [(step, value)]
        self.steps, self.value, self.others = step, value, others


def write_trial(folder: Path, trial: Trial) -> None:
    """Keep a trial's record, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(asdict(trial)))


def read_trial(folder: Path) -> Trial | None:
    """Return the record in a trial's folder; None where the trial is neither over nor paused."""
    file = folder / RECORD
    return trial_from_dict(json.loads(file.read_text())) if file.exists() else None


def trial_from_dict(tree: dict[str, Any]) -> Trial:
    """Turn `asdict` of a trial into the trial again."""
    return Trial(**tree | {"curve": [(step, value) for step, value in tree["curve"]]})


def best_first(trials: Iterable[Trial], mode: str) -> list[Trial]:
    """Return the trials that came to their end, the best first; of equal ones the earlier."""
    sign = 1 if mode == "min" else -1
    return sorted(
        (trial for trial in trials if trial.usable), key=lambda trial: (sign * (trial.value or 0.0), trial.index)
    )


def current_best(trials: Iterable[Trial], mode: str) -> Trial | None:
    """Return the best of those that came to their end; where none has, of those that came farthest."""
    known = list(trials)
    if best := best_first(known, mode):
        return best[0]
    waiting = [trial for trial in known if trial.state == PAUSED and trial.value is not None]
    farthest = [trial for trial in waiting if trial.steps == max(trial.steps for trial in waiting)]
    sign = 1 if mode == "min" else -1
    return min(farthest, key=lambda trial: (sign * (trial.value or 0.0), trial.index), default=None)


def pareto_front(trials: Iterable[Trial], metrics: list[str], modes: list[str]) -> list[Trial]:
    """Return the finished trials that no other one is better than, or equal to, in all metrics and better in one."""
    signs = [1 if mode == "min" else -1 for mode in modes]
    found = best_first(trials, modes[0])
    costs = {
        trial.index: [signs[0] * (trial.value or 0.0)]
        + [sign * trial.others[name] for sign, name in zip(signs[1:], metrics[1:], strict=True)]
        for trial in found
    }

    def beaten(one: Trial) -> bool:
        mine = costs[one.index]
        return any(all(a <= b for a, b in zip(theirs, mine)) and theirs != mine for theirs in costs.values())

    return [trial for trial in found if not beaten(trial)]

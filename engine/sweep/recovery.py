"""What becomes of a trial whose process ended with an error: it has failed, or it was lost and is begun again. No Ray in it.

A trial that was lost (a process was killed, a node is gone) goes on from its last checkpoint, or starts over where it had
none; being a function of its values alone, it comes to the same figures. It is begun again train.max_failures times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.sweep.trial_record import Trial

# In a trial's logs: why it failed, or which of its workers was lost; with neither, its first process was.
FAILED, LOST = "failed.txt", "lost.txt"
MAX_REASON_CHARS = 300  # characters of a reason


class WorkerLost(Exception):
    """A worker's process, or its node, is gone."""


def write_failure_reason(logs: Path, fault: BaseException) -> None:
    """Leave the reason for which a trial's process ends, for the sweep to find."""
    (logs / (LOST if isinstance(fault, WorkerLost) else FAILED)).write_text(str(fault).strip() or repr(fault))


def clear_failure_reason(logs: Path) -> None:
    """Take away what an earlier attempt has noted."""
    for name in (FAILED, LOST):
        (logs / name).unlink(missing_ok=True)


class Recovery:
    """Decides about trials that ended with an error, and keeps the tasks that are to be handed out again."""

    def __init__(self, most: int) -> None:
        """Begin each trial again up to `most` times; -1: without end."""
        self._most = most
        self._waiting: list[dict[str, Any]] = []

    def next(self) -> dict[str, Any] | None:
        """Return a task to be handed out again, if there is one."""
        return self._waiting.pop(0) if self._waiting else None

    def judge(self, trial: Trial, task: dict[str, Any], logs: Path) -> tuple[bool, str]:
        """Return whether a trial that ended with an error is begun again with `task`, and what there is to say of it."""
        if (logs / FAILED).exists():
            return False, (logs / FAILED).read_text()[:MAX_REASON_CHARS]
        reason = (logs / LOST).read_text()[:MAX_REASON_CHARS] if (logs / LOST).exists() else "its worker 0 was lost"
        if 0 <= self._most <= trial.losses:
            return False, f"{reason}, after {trial.losses} restarts (train.max_failures)"
        trial.losses += 1
        self._waiting.append(task)
        return True, reason

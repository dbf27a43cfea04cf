"""Decides about a trial whose process ended with an error: the trial failed, or a worker was lost and it is restarted.

A trial that lost a worker (a process was killed, a node is gone) resumes from its last checkpoint, or starts over without
one; since its curve depends on its params alone, the results are the same. It is restarted up to train.max_failures times.
Uses no Ray.
"""

from __future__ import annotations

from pathlib import Path

from engine.sweep.trial_record import Trial, TrialTask

# Files in a trial's logs: why it failed, or which worker was lost. Without either, rank 0's process was lost.
FAILED, LOST = "failed.txt", "lost.txt"
MAX_REASON_CHARS = 300


class WorkerLost(Exception):
    """A worker's process, or its node, is gone."""


def write_failure_reason(logs: Path, error: BaseException) -> None:
    """Write why a trial's process ends, for the sweep's driver to read."""
    (logs / (LOST if isinstance(error, WorkerLost) else FAILED)).write_text(str(error).strip() or repr(error))


def clear_failure_reason(logs: Path) -> None:
    """Delete what an earlier attempt has written."""
    for name in (FAILED, LOST):
        (logs / name).unlink(missing_ok=True)


class Recovery:
    """Decides about trials that ended with an error, and queues the tasks to be restarted."""

    def __init__(self, max_restarts: int) -> None:
        """Restart each trial up to `max_restarts` times; -1: without limit."""
        self._max_restarts = max_restarts
        self._queue: list[TrialTask] = []

    def next_task(self) -> TrialTask | None:
        """Return a task to be restarted, if there is one."""
        return self._queue.pop(0) if self._queue else None

    def handle_error(self, trial: Trial, task: TrialTask, logs: Path) -> tuple[bool, str]:
        """Return whether a trial that ended with an error is restarted with `task`, and the reason of the error."""
        if (logs / FAILED).exists():
            return False, (logs / FAILED).read_text()[:MAX_REASON_CHARS]
        reason = (logs / LOST).read_text()[:MAX_REASON_CHARS] if (logs / LOST).exists() else "its worker 0 was lost"
        if 0 <= self._max_restarts <= trial.losses:
            return False, f"{reason}, after {trial.losses} restarts (train.max_failures)"
        trial.losses += 1
        self._queue.append(task)
        return True, reason

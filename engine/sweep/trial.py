"""One trial: the same training job as any other, with some keys changed, that reports as it goes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from engine.config import with_values
from engine.train.job import Job
from engine.train.launch import run_workers
from engine.train.run_folder import MetricsTail, RunFolder
from engine.train.worker import local_group, work

FAILED = "failed.txt"  # in a trial's logs: why it failed


def run_trial(params: dict[str, Any], spec: dict[str, Any], metric: str) -> None:
    """Train with `params` (dotted key -> value) over the base job `spec`, reporting `metric` at each validation to Tune.

    A single worker trains in this very process, which Tune keeps warm from trial to trial; several are a worker group
    of Ray Train of their own.
    """
    from ray import tune

    base = Job.from_dict(spec)
    name = f"trial-{tune.get_context().get_trial_id()}"
    job = Job(with_values(base.config, {**params, "name": name}), base.data, base.start)
    run = RunFolder(job.config.run_dir)
    run.logs.mkdir(parents=True, exist_ok=True)

    reported: set[int] = set()

    def report(line: dict[str, Any]) -> None:
        if f"validation_{metric}" in line and line["step"] not in reported:
            reported.add(line["step"])
            tune.report({"step": line["step"], metric: line[f"validation_{metric}"]})

    def report_but_last(line: dict[str, Any]) -> None:
        if line["step"] < job.config.train.max_steps:  # Tune ends the trial at its last report: the bundle comes first
            report(line)

    try:
        if job.config.train.workers == 1:
            last = work(job, local_group(), listen=report_but_last)
        else:
            last = follow(WorkerGroup(job, run), MetricsTail(run.metrics_file), report_but_last)
    except Exception as error:
        (run.logs / FAILED).write_text(str(error).strip() or repr(error))  # Tune keeps a trace, this is the reason
        raise
    report(last)


def follow(group: WorkerGroup, tail: MetricsTail, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Report a worker group's lines as they come; return the last."""
    last: dict[str, Any] = {}
    while not group.ended(wait_s=0.2):
        for last in tail.lines():
            report(last)
    for last in tail.lines():
        report(last)
    return last


class WorkerGroup:
    """A trial's own worker group, run from a thread so that the trial can report meanwhile."""

    def __init__(self, job: Job, run: RunFolder) -> None:
        """Start it."""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(job, run), daemon=True)
        self._thread.start()

    def _run(self, job: Job, run: RunFolder) -> None:
        try:
            run_workers(job, run)
        except Exception as error:  # raised by `ended`, in the trial's thread
            self._error = error

    def ended(self, wait_s: float) -> bool:
        """Wait at most `wait_s` seconds for the end. Raises what ended it."""
        self._thread.join(wait_s)
        if self._error:
            raise self._error
        return not self._thread.is_alive()

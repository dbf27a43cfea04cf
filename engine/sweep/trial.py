"""One trial: the same training job as any other, with some keys changed, that reports as it goes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from engine.config import with_values
from engine.errors import UserError
from engine.train.launch import run_workers
from engine.train.run_folder import MetricsTail, RunFolder
from engine.train.worker import Job, local_group, work


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

    def report(line: dict[str, Any]) -> None:
        if f"validation_{metric}" in line:
            tune.report({"step": line["step"], metric: line[f"validation_{metric}"], "loss": line["loss"]})

    if job.config.train.workers == 1:
        work(job, local_group(), listen=report)
        return
    group = threading.Thread(target=run_workers, args=(job, run), daemon=True)
    group.start()
    tail = MetricsTail(run.metrics_file)
    while group.is_alive() or (run.path / "bundle").exists():
        group.join(0.2)
        for line in tail.lines():
            report(line)
        if not group.is_alive():
            return
    raise UserError(f"the workers of {name} ended without a bundle: see {Path(run.logs)}")

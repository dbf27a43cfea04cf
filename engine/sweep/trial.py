"""One trial in its worker process: a training job with some options changed, which reports its validation results to Tune."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.config import with_values
from engine.errors import UserError
from engine.sweep.rank_group import RankGroup
from engine.sweep.recovery import WorkerLost, clear_failure_reason, write_failure_reason
from engine.sweep.start_weights import start_state_factory
from engine.sweep.trial_record import TrialTask
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.loop import Metrics
from engine.train.run_folder import RunFolder
from engine.train.worker import single_process_group, train_worker
from engine.train.zero import import_deepspeed

FAILURE = "failed"  # key of a report: why the trial failed
STOP_TIMEOUT_S = "60"  # for a stopped trial to clean up its process for the next one
kept_rank_groups: list[RankGroup] = []  # at most one: reused by the trials of this process


def run_trial(
    config: dict[str, Any],
    spec: dict[str, Any],
    metrics: Sequence[str],
    resources: dict[str, float],
    state: list[Any],
) -> None:
    """Train a task, Tune's `config` of the trial, on the base job `spec`; report the `metrics` of each validation to Tune.

    Tune's trial process is rank 0; further workers, each with `resources`, are kept beside it. `state` holds the reference
    of the start state. Tune stops a trial by raising SystemExit from a report; its checkpoints are deleted then.
    """
    from ray import tune

    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = STOP_TIMEOUT_S
    warm_up_process()
    task = TrialTask(**config)
    job = trial_job(task, TrainJob.from_dict(spec))
    run = RunFolder(job.config.run_dir)
    run.logs.mkdir(parents=True, exist_ok=True)
    clear_failure_reason(run.logs)
    reported: set[int] = set()

    def report(line: Metrics) -> None:
        if any(name.startswith("validation_") for name in line) and line["step"] not in reported:
            reported.add(line["step"])
            tune.report({"step": line["step"], "process": os.getpid(), **metric_values(line, metrics)})

    def report_but_last(line: Metrics) -> None:
        # Tune ends the trial at its last report, which must come after the last checkpoint.
        if line["step"] < job.config.train.max_steps:
            report(line)

    try:
        for line in lines_since(run, task.start_step):
            report_but_last(line)
        last = train(job, resources, state, report_but_last)
        report(last or list(run.metrics())[-1])  # empty if the trial had ended before a kill
    except SystemExit:
        delete_checkpoints(run)
        raise
    except WorkerLost as error:
        write_failure_reason(run.logs, error)
        raise
    except Exception as error:
        delete_checkpoints(run)
        write_failure_reason(run.logs, error)  # Tune keeps only the traceback
        if not isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)) or not all_workers_intact():
            raise  # a process may be in a bad state: Tune starts another one for the next trial
        tune.report({FAILURE: str(error).strip() or repr(error)})
    finally:
        for rank in range(job.config.train.workers):
            run.heartbeat(rank).unlink(missing_ok=True)
        gc.collect()  # a DeepSpeed engine is a reference cycle


def train(job: TrainJob, resources: dict[str, float], state: list[Any], report: Callable[[Metrics], None]) -> Metrics:
    """Train, in this process or as rank 0 of its rank group; return the last metrics."""
    import ray

    if job.config.train.workers == 1:
        limit_gpu_memory(resources)
        factory = start_state_factory(ray.get(state[0]))
        return train_worker(job, single_process_group(), on_step=report, model_factory=factory)
    if not kept_rank_groups:
        kept_rank_groups.append(RankGroup(job, resources))
    return kept_rank_groups[0].train(job, state, report)


def limit_gpu_memory(resources: dict[str, float]) -> None:
    """Limit this process to its fraction of the GPU's memory, since other trials use the rest."""
    if torch.cuda.is_available() and 0 < resources.get("GPU", 0) < 1:
        torch.cuda.set_per_process_memory_fraction(resources["GPU"])


@functools.cache
def warm_up_process() -> None:
    """Import what every trial needs, and exclude it from garbage collection, which saves half a second per collection."""
    import_deepspeed()
    gc.collect()
    gc.freeze()


def all_workers_intact() -> bool:
    """Return whether all processes that this one keeps can train another trial."""
    return all(group.is_intact for group in kept_rank_groups)


def delete_checkpoints(run: RunFolder) -> None:
    """Delete the checkpoints of a trial that did not finish."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def lines_since(run: RunFolder, start_step: int) -> list[Metrics]:
    """Return the logged lines after step `start_step`, up to the latest checkpoint, from which a trial resumes."""
    step = next((Checkpoint(folder).state.step for folder in step_folders(run.checkpoints)), 0)
    return [line for line in run.metrics() if start_step < line["step"] <= step]


def trial_job(task: TrialTask, base: TrainJob) -> TrainJob:
    """Return the job of a task."""
    changes = {**task.params, "name": task.name, "train.max_steps": task.end_step}
    return TrainJob(with_values(base.config, changes), Path(task.data_folder), base.start_bundle, exports_bundle=False)


def metric_values(line: Metrics, metrics: Sequence[str]) -> dict[str, float]:
    """Return the metrics in a logged line: those of the validation, else those of the step. Raises UserError for others."""
    values = {}
    for name in metrics:
        value = line.get(f"validation_{name}", line.get(name))
        if not isinstance(value, (int, float)):
            known = ", ".join(key.removeprefix("validation_") for key in line if key.startswith("validation_"))
            raise UserError(f"sweep.metric={name} is not measured here: use one of {known}")
        values[name] = float(value)
    return values

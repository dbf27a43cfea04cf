"""One trial: the same training job as any other, with some keys changed, that reports as it goes."""

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
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.loop import Metrics
from engine.train.run_folder import RunFolder
from engine.train.worker import single_process_group, train_worker
from engine.train.zero import import_deepspeed

FAILURE = "failed"  # in a report: why the trial failed
STOP_S = "60"  # that a stopped trial may take to put its process in order for the next one
kept_rank_group: dict[str, RankGroup] = {}  # what this process keeps from trial to trial


def run_trial(
    task: dict[str, Any], spec: dict[str, Any], metrics: Sequence[str], resources: dict[str, float], state: list[Any]
) -> None:
    """Train what `task` says differs from the base job `spec`, reporting the `metrics` at each validation to Tune.

    The process that Tune keeps for its trials is rank 0; further workers, each with `resources`, stay beside it. `state`
    holds the reference of the start state. Tune ends a trial by raising SystemExit from a report: nothing of it stays, then.
    """
    from ray import tune

    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = STOP_S
    warm_up_process()
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
        if (
            line["step"] < job.config.train.max_steps
        ):  # Tune ends the trial at its last report: the checkpoint comes first
            report(line)

    try:
        for line in lines_since(run, task["since"]):
            report_but_last(line)
        last = train(job, resources, state, report_but_last)
        report(last or list(run.metrics())[-1])  # none, where the trial had come to its end before a kill
    except SystemExit:
        delete_checkpoints(run)
        raise
    except WorkerLost as error:
        write_failure_reason(run.logs, error)
        raise
    except Exception as error:
        delete_checkpoints(run)
        write_failure_reason(run.logs, error)  # Tune keeps a trace, this is the reason
        if not isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)) or not all_workers_intact():
            raise  # the process, or one beside it, may be spoilt: Tune starts another for the next trial
        tune.report({FAILURE: str(error).strip() or repr(error)})
    finally:
        for rank in range(job.config.train.workers):
            run.heartbeat(rank).unlink(missing_ok=True)
        gc.collect()  # a model under DeepSpeed is a circle of references


def train(job: TrainJob, resources: dict[str, float], state: list[Any], report: Callable[[Metrics], None]) -> Metrics:
    """Train, in this process or on the team that it leads; return the last metrics."""
    import ray

    if job.config.train.workers == 1:
        limit_gpu_memory(resources)
        return train_worker(
            job, single_process_group(), on_step=report, model_factory=start_state_factory(ray.get(state[0]))
        )
    if "team" not in kept_rank_group:
        kept_rank_group["team"] = RankGroup(job, resources)
    return kept_rank_group["team"].work(job, state, report)


def limit_gpu_memory(resources: dict[str, float]) -> None:
    """Take no more of a GPU's memory than the fraction that a trial has of it: others have the rest."""
    if torch.cuda.is_available() and 0 < resources.get("GPU", 0) < 1:
        torch.cuda.set_per_process_memory_fraction(resources["GPU"])


@functools.cache
def warm_up_process() -> None:
    """Import what every trial needs, and have the collection after each pass over all of that: half a second each."""
    import_deepspeed()
    gc.collect()
    gc.freeze()


def all_workers_intact() -> bool:
    """Tell whether all processes that this one keeps are ready for another trial."""
    return all(team.whole for team in kept_rank_group.values())


def delete_checkpoints(run: RunFolder) -> None:
    """Leave no checkpoint of a trial that did not come to its end."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def lines_since(run: RunFolder, since: int) -> list[Metrics]:
    """Return the logged lines after step `since` that a trial goes on from: those up to its latest checkpoint."""
    step = next((Checkpoint(folder).state.step for folder in step_folders(run.checkpoints)), 0)
    return [line for line in run.metrics() if since < line["step"] <= step]


def trial_job(task: dict[str, Any], base: TrainJob) -> TrainJob:
    """Return the job of a task: its name, params (dotted key -> value), since and until (steps) and data (a folder)."""
    changes = {**task["params"], "name": task["name"], "train.max_steps": task["until"]}
    return TrainJob(with_values(base.config, changes), Path(task["data"]), base.start_bundle, exports_bundle=False)


def metric_values(line: Metrics, metrics: Sequence[str]) -> dict[str, float]:
    """Return the metrics in a logged line: of the validation, or else what is logged of each step. Raises UserError."""
    found = {}
    for name in metrics:
        value = line.get(f"validation_{name}", line.get(name))
        if not isinstance(value, (int, float)):
            known = ", ".join(key.removeprefix("validation_") for key in line if key.startswith("validation_"))
            raise UserError(f"sweep.metric={name} is not measured here: use one of {known}")
        found[name] = float(value)
    return found

"""Start a sweep on Ray Tune, show how it goes, and make the best trial's bundle the run's own. Ray is up already."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import Config, with_values
from engine.errors import UserError
from engine.objectives.contract import objective_class
from engine.progress import Bar, console
from engine.sweep.space import check_space, tune_space
from engine.sweep.trial import FAILED, run_trial
from engine.train.job import Job
from engine.train.launch import make_job, worker_resources
from engine.train.run_folder import RunFolder, Status, now

DRIVER_CPUS = 0.02  # cores of a trial that only drives a worker group; Tune refuses none at all


@dataclass
class Trial:
    """What became of one trial."""

    name: str
    params: dict[str, Any]
    steps: int = 0
    value: float | None = None  # of the sweep's metric, at the last report
    state: str = "running"  # finished, stopped early, failed
    reason: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, metric)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found; also sweep.json in its folder."""

    metric: str
    mode: str
    trials: list[Trial]
    best: Trial
    seconds: float


def sweep(config: Config) -> SweepResult:
    """Run a sweep to its end, or go on with the one of that name. Raises UserError if no trial finished."""
    started = time.monotonic()
    space = check_space(config)
    run = RunFolder.claim(config)
    file = run.path / "sweep.json"
    if file.exists() and run.bundle.exists():
        console.print(f"sweep '{config.name}' is finished already: {run.bundle}")
        tree = json.loads(file.read_text())
        trials = [Trial(**trial) for trial in tree.pop("trials")]
        return SweepResult(trials=trials, **{**tree, "best": Trial(**tree["best"])})

    objective = objective_class(config.objective.name)
    metric, mode = config.sweep.metric or objective.metric, config.sweep.mode or objective.mode
    grace = config.sweep.grace_steps or max(1, config.train.max_steps // config.sweep.reduction**2)
    job = make_job(config)
    trial_config = with_values(
        job.config,
        {
            "runs_dir": str((run.path / "trials").absolute()),
            "train.evaluate_every": config.train.evaluate_every or grace,
            "train.checkpoint_every": config.train.max_steps,  # the last step's only: a stopped trial leaves nothing
        },
    )
    status = Status("sweep", "running", max_steps=config.sweep.trials, pid=os.getpid(), updated=now(),
                    parent=str(job.start) if job.start else None, data=str(job.data))  # fmt: skip
    run.write_status(status)
    try:
        trials = run_trials(config, Job(trial_config, job.data, job.start), run, tune_space(space), metric, mode, grace)
        finished = [trial for trial in trials if trial.state == "finished" and trial.value is not None]
        if not finished:
            reasons = "; ".join(sorted({trial.reason for trial in trials if trial.reason})) or "none finished"
            raise UserError(f"no trial of sweep '{config.name}' finished ({reasons}): see {run.logs}")
    except BaseException as error:
        state = "stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        run.write_status(replace(status, state=state, updated=now(), message=str(error)[:500]))
        raise
    best = (min if mode == "min" else max)(finished, key=lambda trial: trial.value or 0.0)
    keep_best(run, best)
    result = SweepResult(metric, mode, trials, best, time.monotonic() - started)
    file.write_text(json.dumps(asdict(result)))
    run.write_status(replace(status, state="finished", step=len(trials), loss=best.value, updated=now()))
    track(config, result)
    return result


def run_trials(
    config: Config, job: Job, run: RunFolder, space: dict[str, Any], metric: str, mode: str, grace: int
) -> list[Trial]:
    """Run the trials through Ray Tune; one that was under way in an earlier, killed sweep of that name starts over."""
    import ray
    from ray import tune
    from ray.tune import Callback, FailureConfig, RunConfig
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    slots, share = trial_share(config, ray.cluster_resources())
    alone = config.train.workers == 1
    if not alone:  # the trial itself drives its worker group with a sliver of a core
        cores = {"train.cpus_per_worker": share["CPU"] - DRIVER_CPUS / config.train.workers}
        job = Job(with_values(job.config, cores), job.data, job.start)
    resources = share if alone else {"CPU": DRIVER_CPUS}
    found: dict[str, Trial] = {}

    class Show(Callback):
        """Keeps the trials' curves and moves the bar."""

        def _known(self, trial: Any) -> Trial:
            return found.setdefault(trial.trial_id, Trial(f"trial-{trial.trial_id}", dict(trial.config)))

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            if metric in result:
                known = self._known(trial)
                known.curve.append((result["step"], result[metric]))
                known.steps, known.value = known.curve[-1]
            self._move()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            known = self._known(trial)
            known.state = "finished" if known.steps >= config.train.max_steps else "stopped early"
            self._move()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            known = self._known(trial)
            told = run.path / "trials" / known.name / "logs" / FAILED
            known.state = "failed"
            known.reason = told.read_text()[:300] if told.exists() else f"its process died: see {run.logs / 'ray'}"
            self._move()

        def _move(self) -> None:
            over = [t for t in found.values() if t.state != "running"]
            values = [t.value for t in found.values() if t.value is not None and math.isfinite(t.value)]
            best = f"best {metric} {(min if mode == 'min' else max)(values):.4f}  " if values else ""
            stopped = sum(t.state == "stopped early" for t in over)
            bar.update(len(over), f"{best}{sum(t.steps for t in found.values())} steps, {stopped} stopped early")

    scheduler = (
        AsyncHyperBandScheduler(
            "step", max_t=config.train.max_steps, grace_period=grace, reduction_factor=config.sweep.reduction
        )
        if config.sweep.scheduler == "asha"
        else FIFOScheduler()
    )
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, spec=job.to_dict(), metric=metric), tune.PlacementGroupFactory([resources])
    )
    folder = (run.path / "tune").absolute()
    run_config = RunConfig(
        name=folder.name,
        storage_path=str(folder.parent),
        verbose=0,
        callbacks=[Show()],
        failure_config=FailureConfig(0),
    )
    if tune.Tuner.can_restore(str(folder)):
        shutil.rmtree(folder)
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        run_config=run_config,
        tune_config=tune.TuneConfig(
            metric=metric, mode=mode, num_samples=config.sweep.trials, scheduler=scheduler, reuse_actors=alone,
            search_alg=BasicVariantGenerator(max_concurrent=slots, random_state=config.seed),
        ),
    )  # fmt: skip
    points = math.prod(len(domain["grid_search"]) for domain in space.values() if isinstance(domain, dict))
    with Bar("sweep", total=config.sweep.trials * points) as bar:
        tuner.fit()
    return list(found.values())


def trial_share(config: Config, cluster: dict[str, float]) -> tuple[int, dict[str, float]]:
    """Return how many trials run at a time and the resources of each worker of theirs.

    A trial gets what its workers ask for; where they ask for nothing, the trials share the cores, one core each or more.
    """
    train, cpus = config.train, cluster.get("CPU", 1.0)
    asked = worker_resources(config, cluster)
    if train.cpus_per_worker is None and not asked.get("GPU"):
        slots = config.sweep.concurrent or max(1, int(cpus / train.workers))
        return min(slots, config.sweep.trials), {"CPU": int(100 * max(0.5, cpus / slots / train.workers)) / 100}
    fits = min(int(cluster[kind] / (each * train.workers) + 1e-6) for kind, each in asked.items() if each)
    return min(config.sweep.concurrent or fits, fits), asked


def keep_best(run: RunFolder, best: Trial) -> None:
    """Make the best trial's bundle the run's own; of the others keep metrics and logs only."""
    trials = run.path / "trials"
    part = run.path / ".bundle.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(trials / best.name / "bundle", part)
    shutil.rmtree(run.bundle, ignore_errors=True)
    part.rename(run.bundle)
    for folder in trials.iterdir():
        for heavy in ("checkpoints", "bundle"):
            shutil.rmtree(folder / heavy, ignore_errors=True)


def track(config: Config, result: SweepResult) -> None:
    """Log the sweep to MLflow: a run, and a child run for each trial."""
    if not config.tracking.enabled:
        return
    from engine.train.launch import suppress_tracking_errors
    from engine.train.tracking import TrackedRun

    moment = int(time.time() * 1000)
    with suppress_tracking_errors():
        parent = TrackedRun(config)
        for trial in result.trials:
            child = TrackedRun(with_values(config, {**trial.params, "name": trial.name}), parent.id)
            child.log([{"step": step, f"validation_{result.metric}": value} for step, value in trial.curve], moment)
            child.end("FAILED" if trial.state == "failed" else "FINISHED")
        parent.log([{"step": result.best.steps, f"validation_{result.metric}": result.best.value}], moment)
        parent.end("FINISHED")


def trial_folder(run: RunFolder, trial: Trial) -> Path:
    """Return where a trial's metrics and logs are."""
    return run.path / "trials" / trial.name

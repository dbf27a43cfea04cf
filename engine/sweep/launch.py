"""Run a sweep on Ray Tune, show its progress, and export the winner's bundle. Ray is initialized already."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import Config, flatten, with_values
from engine.errors import UserError
from engine.objectives.contract import objective_class
from engine.progress import console
from engine.sweep import winner as winners
from engine.sweep.gaussian_process import pb2_explore
from engine.sweep.memory_check import MemoryCheck
from engine.sweep.optuna_trials import importances
from engine.sweep.population import PopulationBasedTraining, pbt_explore, perturbation_interval
from engine.sweep.progress_table import ProgressTable
from engine.sweep.recovery import Recovery
from engine.sweep.search_algorithm import IndependentTrials, PlaceTrial, SearchAlgorithm
from engine.sweep.search_space import SearchSpace, num_trials, parse_search_space
from engine.sweep.searchers import make_searcher
from engine.sweep.start_weights import make_start_state
from engine.sweep.stopping import grace_steps, make_stopping_rule, rungs
from engine.sweep.successive_halving import SuccessiveHalving
from engine.sweep.trial import FAILURE, run_trial
from engine.sweep.trial_record import Trial, TrialTask, best_first, pareto_front, trial_from_dict
from engine.train.job import TrainJob
from engine.train.launch import make_job, worker_resources
from engine.train.run_folder import RunFolder, RunStatus, now

UNLIMITED_TRIALS = 10**9  # for Tune: the search algorithm decides when the sweep is done
TUNE_ENVIRONMENT = {  # no log files and no state of Tune, since the sweep writes its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep, also written to sweep.json in its folder."""

    metric: str
    mode: str
    trials: list[Trial]
    best: Trial
    seconds: float
    metrics: list[str] = field(default_factory=list)  # all of them
    front: list[str] = field(default_factory=list)  # with several metrics: names of the Pareto-optimal trials
    importances: dict[str, float] = field(default_factory=dict)  # key -> share of the variance between trials
    exploits: list[dict[str, Any]] = field(default_factory=list)  # PBT, PB2: which member copied which one, and when
    bundle: dict[str, Any] = field(default_factory=dict)  # the run that the bundle is from, and its value


def sweep(config: Config) -> SweepResult:
    """Run a sweep to its end, resuming it if it was interrupted. Raises UserError if no trial finished.

    After a kill, trials that are over are not repeated; a running trial resumes from its last checkpoint
    (train.checkpoint_every), or starts over if it had none.
    """
    started_at = time.monotonic()
    space = parse_search_space(config)
    run = RunFolder.create_or_resume(config)
    file = run.path / "sweep.json"
    if file.exists() and run.bundle.exists() and is_complete(done := read_result(file), space, config):
        console.print(f"sweep '{config.name}' is finished already: {run.bundle}")
        return done
    objective = objective_class(config.objective.name)
    metrics = (config.sweep.metric or objective.metric).split("+")
    modes = (config.sweep.mode or objective.mode).split("+")
    job = base_job(config, run)
    status = RunStatus("sweep", "running", max_steps=num_trials(space, config), pid=os.getpid(), updated=now(),
                    parent=str(job.start_bundle) if job.start_bundle else None, data=str(job.data_folder))  # fmt: skip
    run.write_status(status)
    try:
        result = run_and_select(config, job, space, run, metrics, modes)
    except BaseException as error:
        state = "stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        run.write_status(replace(status, state=state, updated=now(), message=str(error)[:500]))
        raise
    result = replace(result, seconds=time.monotonic() - started_at)
    file.write_text(json.dumps(asdict(result)))
    winners.delete_trial_checkpoints(run, result.best.name)
    run.write_status(replace(status, state="finished", step=len(result.trials), loss=result.best.value, updated=now()))
    log_to_mlflow(config, result)
    return result


def run_and_select(
    config: Config, job: TrainJob, space: SearchSpace, run: RunFolder, metrics: list[str], modes: list[str]
) -> SweepResult:
    """Run the remaining trials, select the winner and export its bundle."""
    algorithm, place_trial = make_search_algorithm(config, job, space, metrics, modes)
    with ProgressTable(algorithm.total, config.train.max_steps, metrics[0], modes[0]) as table:
        table.show(algorithm.trials.values())
        if not algorithm.is_done:
            run_trials(config, job, run, algorithm, metrics, lambda: table.show(algorithm.trials.values()))
    trials = [algorithm.trials[index] for index in sorted(algorithm.trials)]
    best = best_first(trials, modes[0])
    if not best:
        reasons = "; ".join(sorted({trial.reason for trial in trials if trial.reason})) or "none finished"
        raise UserError(f"no trial of sweep '{config.name}' finished ({reasons}): see {run.logs}")
    winner = None
    if config.sweep.retrain_steps:
        winner = winners.retrain(job, best[0], place_trial, config.sweep.retrain_steps)
    elif config.sweep.soup:
        winner = winners.soup(job, trials, place_trial, metrics[0], modes[0])
    winner = winner or winners.winner_of_trial(job, best[0], place_trial)
    winners.write_sweep_bundle(winner, run)
    return SweepResult(
        metrics[0], modes[0], trials, best[0], 0.0, metrics,
        front=[trial.name for trial in pareto_front(trials, metrics, modes)] if len(metrics) > 1 else [],
        importances=importances(space, trials, modes[0]),
        exploits=[asdict(e) for e in algorithm.state.exploits] if isinstance(algorithm, PopulationBasedTraining) else [],
        bundle={"name": winner.job.config.name, "value": winners.winner_value(winner, metrics[0]), "step": winner.line["step"]},
    )  # fmt: skip


def base_job(config: Config, run: RunFolder) -> TrainJob:
    """Prepare the data, and return the job of which each trial changes some options."""
    job = make_job(config)
    evaluate_every = perturbation_interval(config) if config.sweep.scheduler in ("pbt", "pb2") else grace_steps(config)
    values = {
        "runs_dir": str((run.path / "trials").absolute()),
        "train.evaluate_every": config.train.evaluate_every or evaluate_every,
        "train.keep_checkpoints": 1,  # the latest, to resume from
        "tracking.enabled": False,  # the sweep logs its trials when it has ended
    }
    return TrainJob(with_values(job.config, values), job.data_folder, job.start_bundle, exports_bundle=False)


def make_search_algorithm(
    config: Config, job: TrainJob, space: SearchSpace, metrics: Sequence[str], modes: Sequence[str]
) -> tuple[SearchAlgorithm, PlaceTrial]:
    """Return the search algorithm, resumed if the sweep was interrupted, and the function that places its trials."""
    slots, resources = trial_share(config, trial_resources(config))
    place_trial = TrialPlacement(config, job, MemoryCheck(config, slots, resources.get("GPU", 0.0)))
    folder = Path(job.config.runs_dir)
    if config.sweep.scheduler in ("pbt", "pb2"):
        explore = pbt_explore(space) if config.sweep.scheduler == "pbt" else pb2_explore(space, modes[0])
        return PopulationBasedTraining(config, folder, metrics, modes[0], space, place_trial, explore), place_trial
    searcher = make_searcher(space, config, metrics, modes, rungs(config))
    if config.sweep.scheduler in ("asha", "hyperband"):
        return SuccessiveHalving(config, folder, metrics, searcher, modes[0], place_trial, rungs(config)), place_trial
    return IndependentTrials(
        config, folder, metrics, searcher, make_stopping_rule(config, modes[0]), place_trial
    ), place_trial


class TrialPlacement:
    """Finds a micro-batch that fits a trial, and prepares the data that its params need."""

    def __init__(self, config: Config, base: TrainJob, memory_check: MemoryCheck) -> None:
        """Start with the data of the base job."""
        self._config, self._base, self._memory_check = config, base, memory_check
        self._data_folders = {self._data_key(config): base.data_folder}

    def __call__(self, params: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """Return the params, with a smaller micro-batch if needed, and the data folder. Raises UserError if none fits."""
        config = with_values(self._config, params)
        start = {"bundle": str(self._base.start_bundle)} if self._base.start_bundle else {}
        fitting, reason = self._memory_check.fit_micro_batch(with_values(config, start))
        if fitting is None:
            raise UserError(reason)
        if fitting.train.micro_batch != config.train.micro_batch:
            params = params | {"train.micro_batch": fitting.train.micro_batch}
        key = self._data_key(config)
        if key not in self._data_folders:
            self._data_folders[key] = make_job(config).data_folder
        return params, self._data_folders[key]

    def _data_key(self, config: Config) -> str:
        return json.dumps({k: v for k, v in flatten(config).items() if k.startswith(("data.", "objective.name"))})


def run_trials(
    config: Config,
    job: TrainJob,
    run: RunFolder,
    algorithm: SearchAlgorithm,
    metrics: Sequence[str],
    show: Callable[[], None],
) -> None:
    """Run the trials of a search algorithm on Ray Tune, which reuses worker processes from trial to trial."""
    import ray
    from ray import tune
    from ray.tune import FailureConfig, RunConfig

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ |= TUNE_ENVIRONMENT
    slots, resources = trial_share(config, trial_resources(config))
    if algorithm.has_partial_tasks:
        job = replace(job, config=with_values(job.config, {"schedule.total_steps": config.total_steps}))
    state = [ray.put(make_start_state(job))]  # once for all trials; in a list, so that Ray passes the reference
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, spec=job.to_dict(), metrics=list(metrics), resources=resources, state=state),
        tune.PlacementGroupFactory([resources] * config.train.workers),
    )
    folder = (run.path / "tune").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    searcher, scheduler = tune_adapters(algorithm, Recovery(config.train.max_failures), run, slots, show)
    tuner = tune.Tuner(
        trainable,
        run_config=RunConfig(
            name=folder.name, storage_path=str(folder.parent), verbose=0, failure_config=FailureConfig(0)
        ),
        tune_config=tune.TuneConfig(
            num_samples=UNLIMITED_TRIALS, scheduler=scheduler, search_alg=searcher, reuse_actors=True
        ),
    )
    tuner.fit()
    if not all(trial.is_over for trial in algorithm.trials.values()) or not algorithm.is_done:
        raise KeyboardInterrupt  # Tune ended its trials on Ctrl-C, and did not raise it


def tune_adapters(
    algorithm: SearchAlgorithm, recovery: Recovery, run: RunFolder, slots: int, show: Callable[[], None]
) -> tuple[Any, Any]:
    """Return Tune's searcher and scheduler that request tasks of the search algorithm and forward reports and ends to it."""
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    running: dict[str, TrialTask] = {}  # Tune's trial id -> task
    errors: dict[str, str] = {}
    is_cache_sized: list[bool] = []

    class TaskSource(Searcher):  # type: ignore[misc]
        """Gives the algorithm's tasks to Tune, `slots` at a time."""

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            task = (recovery.next_task() or algorithm.next_task()) if len(running) < slots else None
            show()
            if task is None:  # not finished while a task runs: it may lose a worker and be restarted
                return Searcher.FINISHED if algorithm.is_done and not running else None
            running[trial_id] = task
            return asdict(task)

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            if result is None and not error:  # Tune is interrupted: the trial is not over
                return
            task, reason = running.pop(trial_id), errors.pop(trial_id, None)
            if error:
                trial = algorithm.trials[task.index]
                folder = RunFolder(trial_folder(run, trial))
                is_restarted, reason = recovery.handle_error(trial, task, folder.logs)
                if is_restarted:
                    event = f"trial {trial.name} is restarted: {reason} (restart {trial.losses})"
                    folder.log_event(event)
                    console.print(f"warning: {event}", markup=False)
                    return
            algorithm.on_end(task.index, reason)
            show()

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            """Save nothing: the state is in the trials' folders."""

        def __reduce__(self) -> Any:
            return object, ()  # Tune pickles it, and nothing reads the result

    class ReportForwarder(FIFOScheduler):  # type: ignore[misc]
        """Forwards reports to the algorithm, and stops the trials that it stops."""

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Make Tune keep the processes of all slots: by default it keeps one of several that end at once."""
            if not is_cache_sized:
                is_cache_sized.append(True)
                with contextlib.suppress(AttributeError):  # a private attribute; without it the sweep is only slower
                    tune_controller._tune_controller._actor_cache.increase_max(trial.placement_group_factory, slots)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if trial.trial_id not in running:
                return str(FIFOScheduler.CONTINUE)
            if FAILURE in result:
                errors[trial.trial_id] = result[FAILURE][:300]
                return str(FIFOScheduler.CONTINUE)
            metrics = {key: value for key, value in result.items() if isinstance(value, (int, float))}
            index = running[trial.trial_id].index
            stop = algorithm.on_report(index, result["step"], metrics, result["process"])
            show()
            return str(FIFOScheduler.STOP if stop else FIFOScheduler.CONTINUE)

        def __reduce__(self) -> Any:
            return object, ()  # Tune pickles it, and nothing reads the result

    return TaskSource(), ReportForwarder()


def trial_resources(config: Config) -> dict[str, float]:
    """Return the cores and GPUs of the nodes where trials can run: of GPU nodes only, unless workers use no GPU."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in nodes if node.get("GPU")] if config.train.gpus_per_worker != 0 else []
    return {kind: sum(node.get(kind, 0.0) for node in with_gpus or nodes) for kind in ("CPU", "GPU")}


def trial_share(config: Config, cluster: dict[str, float]) -> tuple[int, dict[str, float]]:
    """Return the number of concurrent trials, and the resources of each of their workers.

    A trial gets the resources that its workers request; without train.cpus_per_worker, concurrent trials share the cores.
    """
    workers, concurrent = config.train.workers, config.sweep.max_concurrent_trials
    requested = worker_resources(config, cluster)
    fits = {kind: int(cluster[kind] / (each * workers) + 1e-6) for kind, each in requested.items()}
    if config.train.cpus_per_worker is not None:
        slots = min(fits.values())
        return min(concurrent or slots, slots), requested
    cpus = cluster.get("CPU", 1.0)
    trials = num_trials(parse_search_space(config), config) if config.sweep.space else config.sweep.trials
    if "GPU" in requested:  # with at least half a core per worker
        slots = max(1, min(concurrent or trials, fits["GPU"], int(2 * cpus / workers)))
    else:
        slots = concurrent or max(1, int(cpus / workers))
    slots = min(slots, trials)
    return slots, requested | {"CPU": int(100 * max(0.5, cpus / slots / workers)) / 100}


def read_result(file: Path) -> SweepResult:
    """Read sweep.json."""
    tree = json.loads(file.read_text())
    trials = [trial_from_dict(trial) for trial in tree.pop("trials")]
    return SweepResult(trials=trials, **{**tree, "best": trial_from_dict(tree["best"])})


def is_complete(result: SweepResult, space: SearchSpace, config: Config) -> bool:
    """Return whether a finished sweep covers the config, which may ask for more or longer trials."""
    return result.best.budget == config.train.max_steps and len(result.trials) >= num_trials(space, config)


def log_to_mlflow(config: Config, result: SweepResult) -> None:
    """Log the sweep to MLflow: a parent run, and a child run for each trial."""
    if not config.tracking.enabled:
        return
    from engine.train.run_monitor import suppress_tracking_errors
    from engine.train.tracking import TrackedRun

    timestamp_ms = int(time.time() * 1000)
    with suppress_tracking_errors():
        parent = TrackedRun(config)
        for trial in result.trials:
            params = {} if trial.state == "refused" else trial.params  # they may be contradictory
            child = TrackedRun(with_values(config, {**params, "name": trial.name}), parent.id)
            child.log(
                [{"step": step, f"validation_{result.metric}": value} for step, value in trial.curve], timestamp_ms
            )
            child.tag("manta.ended", trial.state + (f": {trial.reason}" if trial.reason else ""))
            child.end("FAILED" if trial.state in ("failed", "refused") else "FINISHED")
        parent.log([{"step": result.best.steps, f"validation_{result.metric}": result.best.value}], timestamp_ms)
        parent.end("FINISHED")


def trial_folder(run: RunFolder, trial: Trial) -> Path:
    """Return the folder of a trial's metrics and logs."""
    return run.path / "trials" / trial.name

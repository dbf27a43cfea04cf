"""Start a sweep on Ray Tune, show how it goes, and make the best trial's bundle the run's own. Ray is up already."""

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
from engine.sweep.population import PopulationBasedTraining, pbt_explore, perturbation_interval
from engine.sweep.progress_table import ProgressTable
from engine.sweep.recovery import Recovery
from engine.sweep.search_algorithm import IndependentTrials, PlaceTrial, SearchAlgorithm
from engine.sweep.search_space import SearchSpace, num_trials, parse_search_space
from engine.sweep.searchers import importances, make_searcher
from engine.sweep.start_weights import make_start_state
from engine.sweep.stopping import grace_steps, make_stopping_rule, rungs
from engine.sweep.successive_halving import SuccessiveHalving
from engine.sweep.trial import FAILURE, run_trial
from engine.sweep.trial_record import Trial, best_first, pareto_front, trial_from_dict
from engine.train.job import TrainJob
from engine.train.launch import make_job, worker_resources
from engine.train.run_folder import RunFolder, RunStatus, now

UNLIMITED_TRIALS = 10**9  # trials: the course says when it is over
TUNE_ENVIRONMENT = {  # for Tune: no files of its own beside ours, and none of its state, which ours replaces
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found; also sweep.json in its folder."""

    metric: str
    mode: str
    trials: list[Trial]
    best: Trial
    seconds: float
    metrics: list[str] = field(default_factory=list)  # all of them
    front: list[str] = field(default_factory=list)  # with several: the trials that none is better than in all
    importances: dict[str, float] = field(default_factory=dict)  # key -> share of the differences
    exploits: list[dict[str, Any]] = field(default_factory=list)  # pbt, pb2: who copied whom, and when
    bundle: dict[str, Any] = field(default_factory=dict)  # of which run the bundle is, and what it measures


def sweep(config: Config) -> SweepResult:
    """Run a sweep to its end, or go on with the one of that name. Raises UserError if no trial finished.

    After a kill no trial that was over is repeated; one that was under way goes on from its last checkpoint
    (train.checkpoint_every), and starts over where it had none.
    """
    started = time.monotonic()
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
    result = replace(result, seconds=time.monotonic() - started)
    file.write_text(json.dumps(asdict(result)))
    winners.delete_trial_checkpoints(run, result.best.name)
    run.write_status(replace(status, state="finished", step=len(result.trials), loss=result.best.value, updated=now()))
    log_to_mlflow(config, result)
    return result


def run_and_select(
    config: Config, job: TrainJob, space: SearchSpace, run: RunFolder, metrics: list[str], modes: list[str]
) -> SweepResult:
    """Run the trials that are left, and write the bundle of the best."""
    course, place = make_search_algorithm(config, job, space, metrics, modes)
    with ProgressTable(course.total, config.train.max_steps, metrics[0], modes[0]) as board:
        board.show(course.trials.values())
        if not course.done:
            run_trials(config, job, run, course, metrics, lambda: board.show(course.trials.values()))
    trials = [course.trials[index] for index in sorted(course.trials)]
    best = best_first(trials, modes[0])
    if not best:
        reasons = "; ".join(sorted({trial.reason for trial in trials if trial.reason})) or "none finished"
        raise UserError(f"no trial of sweep '{config.name}' finished ({reasons}): see {run.logs}")
    chosen = None
    if config.sweep.retrain_steps:
        chosen = winners.retrain(job, best[0], place, config.sweep.retrain_steps)
    elif config.sweep.soup:
        chosen = winners.soup(job, trials, place, metrics[0], modes[0])
    chosen = chosen or winners.winner_of_trial(job, best[0], place)
    winners.write_sweep_bundle(chosen, run)
    return SweepResult(
        metrics[0], modes[0], trials, best[0], 0.0, metrics,
        front=[trial.name for trial in pareto_front(trials, metrics, modes)] if len(metrics) > 1 else [],
        importances=importances(space, trials, modes[0]),
        exploits=[asdict(e) for e in course.state.exploits] if isinstance(course, PopulationBasedTraining) else [],
        bundle={"name": chosen.job.config.name, "value": winners.winner_value(chosen, metrics[0]), "step": chosen.line["step"]},
    )  # fmt: skip


def base_job(config: Config, run: RunFolder) -> TrainJob:
    """Prepare the data, and return the job of which each trial changes some keys."""
    job = make_job(config)
    every = perturbation_interval(config) if config.sweep.scheduler in ("pbt", "pb2") else grace_steps(config)
    values = {
        "runs_dir": str((run.path / "trials").absolute()),
        "train.evaluate_every": config.train.evaluate_every or every,
        "train.keep_checkpoints": 1,  # the latest, for a sweep that goes on after a kill
        "tracking.enabled": False,  # the sweep itself logs its trials, and after the last of them
    }
    return TrainJob(with_values(job.config, values), job.data_folder, job.start_bundle, exports_bundle=False)


def make_search_algorithm(
    config: Config, job: TrainJob, space: SearchSpace, metrics: Sequence[str], modes: Sequence[str]
) -> tuple[SearchAlgorithm, PlaceTrial]:
    """Return how the sweep goes, as far as it has come, and what places its trials."""
    slots, share = trial_share(config, resources_for(config))
    place = TrialPlacement(config, job, MemoryCheck(config, slots, share.get("GPU", 0.0)))
    folder = Path(job.config.runs_dir)
    if config.sweep.scheduler in ("pbt", "pb2"):
        explore = pbt_explore(space) if config.sweep.scheduler == "pbt" else pb2_explore(space, modes[0])
        return PopulationBasedTraining(config, folder, metrics, modes[0], space, place, explore), place
    searcher = make_searcher(space, config, metrics, modes, rungs(config))
    if config.sweep.scheduler in ("asha", "hyperband"):
        return SuccessiveHalving(config, folder, metrics, searcher, modes[0], place, rungs(config)), place
    return IndependentTrials(config, folder, metrics, searcher, make_stopping_rule(config, modes[0]), place), place


class TrialPlacement:
    """Finds what a trial takes: a micro-batch that fits, and data that are prepared as its values ask."""

    def __init__(self, config: Config, base: TrainJob, room: MemoryCheck) -> None:
        """Begin with the data of the base job."""
        self._config, self._base, self._room = config, base, room
        self._data = {self._facts(config): base.data_folder}

    def __call__(self, params: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """Return the values, with another micro-batch if need be, and the folder of the data. Raises UserError if none fits."""
        config = with_values(self._config, params)
        start = {"bundle": str(self._base.start_bundle)} if self._base.start_bundle else {}
        fitting, reason = self._room.fitted(with_values(config, start))
        if fitting is None:
            raise UserError(reason)
        if fitting.train.micro_batch != config.train.micro_batch:
            params = params | {"train.micro_batch": fitting.train.micro_batch}
        facts = self._facts(config)
        if facts not in self._data:
            self._data[facts] = make_job(config).data_folder
        return params, self._data[facts]

    def _facts(self, config: Config) -> str:
        return json.dumps({k: v for k, v in flatten(config).items() if k.startswith(("data.", "objective.name"))})


def run_trials(
    config: Config,
    job: TrainJob,
    run: RunFolder,
    course: SearchAlgorithm,
    metrics: Sequence[str],
    show: Callable[[], None],
) -> None:
    """Run the trials of a course through Ray Tune, whose worker processes go on from trial to trial."""
    import ray
    from ray import tune
    from ray.tune import FailureConfig, RunConfig

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ |= TUNE_ENVIRONMENT
    slots, share = trial_share(config, resources_for(config))
    if course.in_parts:
        job = replace(job, config=with_values(job.config, {"schedule.total_steps": config.total_steps}))
    state = [ray.put(make_start_state(job))]  # once, for every process of every trial; the list keeps it a reference
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, spec=job.to_dict(), metrics=list(metrics), resources=share, state=state),
        tune.PlacementGroupFactory([share] * config.train.workers),
    )
    folder = (run.path / "tune").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    searcher, judge = tune_adapters(course, Recovery(config.train.max_failures), run, slots, show)
    tuner = tune.Tuner(
        trainable,
        run_config=RunConfig(
            name=folder.name, storage_path=str(folder.parent), verbose=0, failure_config=FailureConfig(0)
        ),
        tune_config=tune.TuneConfig(
            num_samples=UNLIMITED_TRIALS, scheduler=judge, search_alg=searcher, reuse_actors=True
        ),
    )
    tuner.fit()
    if not all(trial.over for trial in course.trials.values()) or not course.done:
        raise KeyboardInterrupt  # which Tune has swallowed, with its trials


def tune_adapters(
    course: SearchAlgorithm, recovery: Recovery, run: RunFolder, slots: int, show: Callable[[], None]
) -> tuple[Any, Any]:
    """Return the searcher and the scheduler by which Tune asks the course for trials and tells it what becomes of them."""
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    under_way: dict[str, dict[str, Any]] = {}  # Tune's id of a trial -> its task
    failures: dict[str, str] = {}
    keeps: list[bool] = []

    class Ask(Searcher):  # type: ignore[misc]
        """Hands out the course's tasks, `slots` at a time."""

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            task = (recovery.next() or course.next()) if len(under_way) < slots else None
            show()
            if task is None:  # one that is under way may be lost, and begun again
                return Searcher.FINISHED if course.done and not under_way else None
            under_way[trial_id] = task
            return task

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            if result is None and not error:  # Tune is being interrupted: the trial is not over
                return
            task, reason = under_way.pop(trial_id), failures.pop(trial_id, None)
            if error:
                trial = course.trials[task["index"]]
                folder = RunFolder(trial_folder(run, trial))
                again, reason = recovery.judge(trial, task, folder.logs)
                if again:
                    told = f"trial {trial.name} is begun again: {reason} (restart {trial.losses})"
                    folder.log_event(told)
                    console.print(f"warning: {told}", markup=False)
                    return
            course.end(task["index"], reason)
            show()

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            """Save nothing: the course's own folder has it all."""

        def __reduce__(self) -> Any:
            return object, ()  # Tune keeps a picture of it, which nobody reads

    class Judge(FIFOScheduler):  # type: ignore[misc]
        """Tells the course of each report, and Tune what follows from it."""

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Have Tune keep the processes of all trials: else of several that end at once only one stays warm."""
            if not keeps:
                keeps.append(True)
                with contextlib.suppress(
                    AttributeError
                ):  # it has no public way to say so; without it it is only slower
                    tune_controller._tune_controller._actor_cache.increase_max(trial.placement_group_factory, slots)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if trial.trial_id not in under_way:
                return str(FIFOScheduler.CONTINUE)
            if FAILURE in result:
                failures[trial.trial_id] = result[FAILURE][:300]
                return str(FIFOScheduler.CONTINUE)
            figures = {key: value for key, value in result.items() if isinstance(value, (int, float))}
            index = under_way[trial.trial_id]["index"]
            stop = course.report(index, result["step"], figures, result["process"])
            show()
            return str(FIFOScheduler.STOP if stop else FIFOScheduler.CONTINUE)

        def __reduce__(self) -> Any:
            return object, ()  # Tune keeps a picture of it, which nobody reads

    return Ask(), Judge()


def resources_for(config: Config) -> dict[str, float]:
    """Return the cores and GPUs of the nodes where trials can run: of those with GPUs only, unless a worker takes none."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in nodes if node.get("GPU")] if config.train.gpus_per_worker != 0 else []
    return {kind: sum(node.get(kind, 0.0) for node in with_gpus or nodes) for kind in ("CPU", "GPU")}


def trial_share(config: Config, cluster: dict[str, float]) -> tuple[int, dict[str, float]]:
    """Return how many trials run at a time and the resources of each worker of theirs.

    A trial gets what its workers ask for; where they ask for no cores, the trials that run at a time share these.
    """
    workers, concurrent = config.train.workers, config.sweep.concurrent
    asked = worker_resources(config, cluster)
    fits = {kind: int(cluster[kind] / (each * workers) + 1e-6) for kind, each in asked.items()}
    if config.train.cpus_per_worker is not None:
        most = min(fits.values())
        return min(concurrent or most, most), asked
    cpus = cluster.get("CPU", 1.0)
    trials = num_trials(parse_search_space(config), config) if config.sweep.space else config.sweep.trials
    if "GPU" in asked:  # and half a core a worker at least
        slots = max(1, min(concurrent or trials, fits["GPU"], int(2 * cpus / workers)))
    else:
        slots = concurrent or max(1, int(cpus / workers))
    slots = min(slots, trials)
    return slots, asked | {"CPU": int(100 * max(0.5, cpus / slots / workers)) / 100}


def read_result(file: Path) -> SweepResult:
    """Read sweep.json."""
    tree = json.loads(file.read_text())
    trials = [trial_from_dict(trial) for trial in tree.pop("trials")]
    return SweepResult(trials=trials, **{**tree, "best": trial_from_dict(tree["best"])})


def is_complete(done: SweepResult, space: SearchSpace, config: Config) -> bool:
    """Tell whether a finished sweep is what is asked for now, and not more trials or longer ones."""
    return done.best.budget == config.train.max_steps and len(done.trials) >= num_trials(space, config)


def log_to_mlflow(config: Config, result: SweepResult) -> None:
    """Log the sweep to MLflow: a run, and a child run for each trial."""
    if not config.tracking.enabled:
        return
    from engine.train.run_monitor import suppress_tracking_errors
    from engine.train.tracking import TrackedRun

    moment = int(time.time() * 1000)
    with suppress_tracking_errors():
        parent = TrackedRun(config)
        for trial in result.trials:
            params = {} if trial.state == "refused" else trial.params  # they may contradict each other
            child = TrackedRun(with_values(config, {**params, "name": trial.name}), parent.id)
            child.log([{"step": step, f"validation_{result.metric}": value} for step, value in trial.curve], moment)
            child.tag("manta.ended", trial.state + (f": {trial.reason}" if trial.reason else ""))
            child.end("FAILED" if trial.state in ("failed", "refused") else "FINISHED")
        parent.log([{"step": result.best.steps, f"validation_{result.metric}": result.best.value}], moment)
        parent.end("FINISHED")


def trial_folder(run: RunFolder, trial: Trial) -> Path:
    """Return where a trial's metrics and logs are."""
    return run.path / "trials" / trial.name

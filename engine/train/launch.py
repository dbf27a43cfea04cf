"""Launch a training job on Ray Train from the driver, and monitor it to its end. Ray is initialized already."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.bundles.find import find_bundle
from engine.config import Config, with_values
from engine.data.order import DataOrder
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.objectives.contract import check_data
from engine.progress import ProgressBar, console
from engine.train import preload
from engine.train.job import TrainJob
from engine.train.mirror import Mirror, restore_from_mirror
from engine.train.profile import PAGE
from engine.train.run_folder import RunFolder, RunStatus, adapter_folder, now
from engine.train.run_monitor import RunMonitor

SPARE_KEEP_S = 7 * 24 * 3600  # how long a spare process waits at most
# (count, env_vars=..., nested=..., node_id=..., keep_s=...): starts worker processes on a node in advance
StartSpares = Callable[..., None]


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run."""

    run: RunFolder
    last_metrics: dict[str, Any]  # the last line of metrics.jsonl


def prepare_data(config: Config, start_bundle: Path | None = None) -> Path:
    """Prepare the data, with a progress bar. Tokenizer: the start bundle's, else data.tokenizer, else one trained on the data."""
    started_at = time.monotonic()
    with ProgressBar("prepare", total=100) as bar:

        def show_progress(stage: str, done: int, total: int) -> None:
            bar.update(min(99, 100 * done // max(total, 1)) if stage == "tokenize" else 0, f"{stage} {done:,}")

        folder = prepare(config, start_bundle, show_progress)
        bar.update(100, f"{folder} ({time.monotonic() - started_at:.1f} s)")
    return folder


def make_job(config: Config) -> TrainJob:
    """Find the start bundle, prepare the data with its tokenizer, and check that they fit together."""
    check_data(config.objective.name, config.data)
    start = find_bundle(config.bundle, Path(config.runs_dir), config.tracking_uri) if config.bundle else None
    data = prepare_data(config, start)
    runs_dir = str(Path(config.runs_dir).absolute())  # Ray runs the workers in other working directories
    job = TrainJob(with_values(config, {"runs_dir": runs_dir}), data.absolute(), start and start.absolute())
    check_job(job)
    return job


def check_job(job: TrainJob) -> None:
    """Raise UserError, before a worker starts, for a job that does not fit its data or its start bundle."""
    objective, config = job.objective(), job.config
    options = objective.model_options()
    samples = objective.samples(Split.open(job.data_folder, "train"))
    DataOrder(len(samples), config.global_batch, config.seed)
    if config.data.packing != "end_to_end":
        console.print(packing_summary(samples, config))
    if job.start_bundle:
        from engine.models.build import load_or_make_config

        model_config = load_or_make_config(job.start_bundle, config.model, None, {})
        text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions and config.data.sequence_length > positions:
            raise UserError(
                f"sequence length {config.data.sequence_length:,} is over the {positions:,} positions of "
                f"{job.start_bundle.name}: use data.sequence_length={positions}"
            )
    if config.data.within_documents or config.train.sequence_parallel > 1:
        from engine.models.build import make_config
        from engine.models.document_mask import check_document_mask
        from engine.train.sequence_parallel import check_sequence_parallel

        if not job.start_bundle:
            model_config = make_config(config.model, objective.processor, options)
        if config.data.within_documents:
            check_document_mask(model_config, objective.auto_class, config.model.attention, objective.is_causal)
        if config.train.sequence_parallel > 1:
            check_sequence_parallel(
                model_config, type(objective), config.train.sequence_parallel, config.data.sequence_length
            )


def packing_summary(samples: Any, config: Config) -> str:
    """Return a line on how the training split is packed and how much of it is padding."""
    length = config.data.sequence_length
    return f"packing   {config.data.packing}: {len(samples):,} samples of up to {length:,} tokens, {100 * samples.padding:.2f} % padding"


def train(config: Config, start_spares: StartSpares | None = None) -> TrainResult:
    """Run a training job to its end, resuming it if it has a checkpoint. Raises UserError with the reason of a failure.

    `start_spares` starts processes that stand by for a restart; used if train.spares is set.
    """
    if restore_from_mirror(config):
        console.print(f"the run was restored from {config.train.mirror}/{config.name}")
    run = RunFolder.create_or_resume(config)
    previous = run.status()
    if previous and previous.state == "finished" and previous.step >= config.train.max_steps and run.bundle.exists():
        console.print(f"run '{config.name}' is finished already: {run.bundle}")
        return TrainResult(run, list(run.metrics())[-1])
    import ray

    worker_resources(config, ray.cluster_resources())  # raises before the data are prepared
    job = make_job(config)
    status = RunStatus(
        config.job, "running", max_steps=config.train.max_steps, pid=os.getpid(), updated=now(),
        parent=str(job.start_bundle) if job.start_bundle else None, data=str(job.data_folder),
    )  # fmt: skip
    run.write_status(status)
    monitor = RunMonitor(run, config, status)
    with Mirror(run, config, warn) if config.train.mirror else contextlib.nullcontext():
        try:
            with monitor:
                run_workers(job, run, start_spares if config.train.spares else None)
        except BaseException as error:
            state = "stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
            run.write_status(replace(monitor.status, state=state, updated=now(), message=str(error)[:500]))
            raise
        run.write_status(replace(monitor.status, state="finished", updated=now()))
    if config.profile and (run.profile / PAGE).exists():
        console.print(f"profile   {run.profile / PAGE}")
    console.print(f"bundle    {run.bundle}")
    if adapter_folder(run.bundle).exists():
        console.print(f"adapter   {adapter_folder(run.bundle)}")
    return TrainResult(run, list(run.metrics())[-1])


def warn(text: str) -> None:
    """Print a warning."""
    console.print(f"warning: {text}", markup=False)


def run_workers(job: TrainJob, run: RunFolder, start_spares: StartSpares | None = None) -> None:
    """Run the job's worker group under Ray Train until it ends."""
    import ray
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    from engine.train.trainer import RayTrainer, RendezvousConfig

    for name in ("ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    resources = worker_resources(job.config, ray.cluster_resources())
    _, rank_environment = worker_environments(job.config)
    failed = run.logs / "failed.txt"
    failed.unlink(missing_ok=True)
    train = job.config.train
    trainer = RayTrainer(
        run=run,
        own_ray=job.config.cluster.address == "local",
        hang_timeout_s=train.hang_timeout_s,
        start_spares=start_spares
        and functools.partial(start_spares, env_vars=rank_environment, nested=True, keep_s=SPARE_KEEP_S),
        train_loop_per_worker=ray_train_worker,
        train_loop_config=job.to_dict() | {"driver_path": sys.path},
        backend_config=RendezvousConfig(),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,
            use_gpu=bool(resources.get("GPU")),
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=train.resize_every_s,
        ),
        run_config=RunConfig(
            name=f"{job.config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str((run.logs / "ray_train").absolute()),
            failure_config=FailureConfig(max_failures=train.max_failures),
            worker_runtime_env={"env_vars": {preload.RANK_VARIABLE: "1"}},
        ),
    )
    try:
        trainer.fit()
    except SystemExit as leaving:
        if leaving.code in (0, 1):  # how Ray Train ends after Ctrl-C, once its workers are gone
            raise KeyboardInterrupt from leaving
        raise
    except Exception as error:
        raise UserError(
            f"training failed ({str(error).strip().splitlines()[-1][:300]}): see {run.logs}/worker-0.log"
        ) from error
    if failed.exists():
        raise UserError(failed.read_text())


def worker_environments(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Return the environment variables that Ray Train sets for its controller and for a rank, and for no other process."""
    from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR, get_env_vars_to_propagate

    # Poll the ranks every quarter of a second, to notice a lost one quickly; less often where polling many ranks takes time.
    os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, str(max(0.25, config.train.workers / 200)))
    controller = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()
    return controller, controller | {preload.RANK_VARIABLE: "1"}


def worker_resources(config: Config, cluster: dict[str, float]) -> dict[str, float]:
    """Return the resources of each worker. Raises UserError if the workers do not fit on the cluster."""
    train, cpus, gpus = config.train, cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    gpu = train.gpus_per_worker if train.gpus_per_worker is not None else float(gpus > 0)
    cpu = train.cpus_per_worker or max(0.5, int(100 * cpus / train.workers) / 100)
    for kind, each, available in (("cores", cpu, cpus), ("GPUs", gpu, gpus)):
        min_workers = train.min_workers or train.workers
        if each * min_workers > available + 1e-6:
            fits = int(available / each)
            raise UserError(
                f"{min_workers} workers x {each:g} {kind} are needed, the cluster has {available:g} {kind}: "
                + (
                    f"use train.workers={fits} or less"
                    if fits
                    else "use train.gpus_per_worker=0 or another cluster.address"
                )
            )
    return {"CPU": cpu} | ({"GPU": gpu} if gpu else {})


def ray_train_worker(spec: dict[str, Any]) -> None:
    """Run one rank under Ray Train: join the process group and train."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    job = TrainJob.from_dict(spec)
    run = RunFolder(job.config.run_dir)
    with (run.logs / f"worker-{rank}.log").open("a") as log:  # all output of this process, also that of libraries
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    import torch

    from engine.train.elastic import save_request_poller
    from engine.train.trainer import join_process_group
    from engine.train.watchdog import dump_stacks_on_signal
    from engine.train.worker import train_worker

    if torch.cuda.is_available() is False:
        torch.set_num_threads(max(1, round(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    is_save_requested = save_request_poller() if rank == 0 else lambda: False
    try:
        with dump_stacks_on_signal(run.stacks(rank)):
            train_worker(job, join_process_group(), is_save_requested=is_save_requested)
    except UserError as error:  # a restart would not help
        (run.logs / "failed.txt").write_text(str(error))

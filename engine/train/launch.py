"""Start a training job on Ray Train, show how it goes, and hand back what it left. Ray is up already."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.bundles.find import find_bundle
from engine.config import Config, with_values
from engine.data.order import Order
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.objectives.contract import check_data
from engine.progress import Bar, console
from engine.train import preload
from engine.train.job import Job
from engine.train.mirror import Mirror, take_back
from engine.train.profile import PAGE
from engine.train.run_folder import MetricsTail, RunFolder, Status, adapter_of, now

COUNTS = {"skipped": "skipped", "rollbacks": "rolled back"}  # in a line of metrics.jsonl -> on the bar


SPARE_S = 7 * 24 * 3600  # that a spare process waits, at most
Spare = Callable[..., None]  # (count, env_vars=..., nested=..., node_id=..., keep_s=...): starts processes on a node


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    run: RunFolder
    last: dict[str, Any]  # the last line of metrics.jsonl


def prepare_data(config: Config, start: Path | None = None) -> Path:
    """Prepare the data with a bar: with the tokenizer of the bundle `start`, else of data.tokenizer, else one trained on it."""
    began = time.monotonic()
    with Bar("prepare", total=100) as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.update(min(99, 100 * done // max(total, 1)) if stage == "tokenize" else 0, f"{stage} {done:,}")

        folder = prepare(config, start, show)
        bar.update(100, f"{folder} ({time.monotonic() - began:.1f} s)")
    return folder


def make_job(config: Config) -> Job:
    """Find the start bundle, prepare the data with its tokenizer, and check that they go together."""
    check_data(config.objective.name, config.data)
    start = find_bundle(config.bundle, Path(config.runs_dir), config.tracking_uri) if config.bundle else None
    data = prepare_data(config, start)
    anywhere = with_values(
        config, {"runs_dir": str(Path(config.runs_dir).absolute())}
    )  # workers run in folders of Ray's
    job = Job(anywhere, data.absolute(), start and start.absolute())
    check_job(job)
    return job


def check_job(job: Job) -> None:
    """Raise UserError for a job that its data or its start bundle rules out, before a worker starts."""
    objective, config = job.objective(), job.config
    options = objective.model_options()
    samples = objective.samples(Split.open(job.data, "train"))
    Order(len(samples), config.global_batch, config.seed)
    if config.data.packing != "end_to_end":
        console.print(packed(samples, config))
    if job.start:
        from engine.models.build import load_or_make_config

        shape = load_or_make_config(job.start, config.model, None, {})
        text = shape.get_text_config() if hasattr(shape, "get_text_config") else shape
        positions = getattr(text, "max_position_embeddings", None)
        if positions and config.data.sequence_length > positions:
            raise UserError(
                f"sequence length {config.data.sequence_length:,} is over the {positions:,} positions of "
                f"{job.start.name}: use data.sequence_length={positions}"
            )
    if config.data.within_documents or config.train.sequence_parallel > 1:
        from engine.models.build import make_config
        from engine.models.document_mask import check_document_mask
        from engine.train.sequence_parallel import check_divisible

        shape = shape if job.start else make_config(config.model, objective.processor, options)
        if config.data.within_documents:
            check_document_mask(shape, objective.auto_class, config.model.attention)
        if config.train.sequence_parallel > 1:
            check_divisible(shape, type(objective), config.train.sequence_parallel, config.data.sequence_length)


def packed(samples: Any, config: Config) -> str:
    """Say how the training split is packed, and how much of it is padding."""
    length = config.data.sequence_length
    return f"packing   {config.data.packing}: {len(samples):,} samples of up to {length:,} tokens, {100 * samples.padding:.2f} % padding"


def train(config: Config, spare: Spare | None = None) -> Outcome:
    """Run a training job to its end, or go on with it where it was. Raises UserError with the reason of a failure.

    `spare` starts processes that wait for a restart, if train.spares asks for them.
    """
    if take_back(config):
        console.print(f"the run was taken back from {config.train.mirror}/{config.name}")
    run = RunFolder.claim(config)
    done = run.status()
    if done and done.state == "finished" and done.step >= config.train.max_steps and run.bundle.exists():
        console.print(f"run '{config.name}' is finished already: {run.bundle}")
        return Outcome(run, list(run.metrics())[-1])
    import ray

    worker_resources(config, ray.cluster_resources())  # told before the data are prepared
    job = make_job(config)
    status = Status(
        config.job, "running", max_steps=config.train.max_steps, pid=os.getpid(), updated=now(),
        parent=str(job.start) if job.start else None, data=str(job.data),
    )  # fmt: skip
    run.write_status(status)
    watch = Watch(run, config, status)
    with Mirror(run, config, warn) if config.train.mirror else contextlib.nullcontext():
        try:
            with watch:
                run_workers(job, run, spare if config.train.spares else None)
        except BaseException as error:
            state = "stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
            run.write_status(replace(watch.status, state=state, updated=now(), message=str(error)[:500]))
            raise
        run.write_status(replace(watch.status, state="finished", updated=now()))
    if config.profile and (run.profile / PAGE).exists():
        console.print(f"profile   {run.profile / PAGE}")
    console.print(f"bundle    {run.bundle}")
    if adapter_of(run.bundle).exists():
        console.print(f"adapter   {adapter_of(run.bundle)}")
    return Outcome(run, list(run.metrics())[-1])


def warn(text: str) -> None:
    """Tell the person who follows the run."""
    console.print(f"warning: {text}", markup=False)


def run_workers(job: Job, run: RunFolder, spare: Spare | None = None) -> None:
    """Run the job's worker group through Ray Train until it ends."""
    import ray
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    from engine.train.trainer import RayTrainer, RendezvousConfig

    for name in ("ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    resources, (_, rank_environment) = worker_resources(job.config, ray.cluster_resources()), environments(job.config)
    failed = run.logs / "failed.txt"
    failed.unlink(missing_ok=True)
    train = job.config.train
    trainer = RayTrainer(
        run=run,
        own_ray=job.config.cluster.address == "local",
        hang_timeout_s=train.hang_timeout_s,
        spare=spare and functools.partial(spare, env_vars=rank_environment, nested=True, keep_s=SPARE_S),
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
            worker_runtime_env={"env_vars": {preload.RANK: "1"}},
        ),
    )
    try:
        trainer.fit()
    except SystemExit as leaving:
        if leaving.code in (0, 1):  # what Ray Train makes of Ctrl-C, once its workers are gone
            raise KeyboardInterrupt from leaving
        raise
    except Exception as error:
        raise UserError(
            f"training failed ({str(error).strip().splitlines()[-1][:300]}): see {run.logs}/worker-0.log"
        ) from error
    if failed.exists():
        raise UserError(failed.read_text())


def environments(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Return the environment variables that Ray Train gives to its controller and to a rank, and to no other process."""
    from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR, get_env_vars_to_propagate

    # A quarter of a second to notice a lost rank; longer where there are so many that to ask all of them is work.
    os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, str(max(0.25, config.train.workers / 200)))
    controller = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()
    return controller, controller | {preload.RANK: "1"}


def worker_resources(config: Config, cluster: dict[str, float]) -> dict[str, float]:
    """Return a worker's share of the cluster. Raises UserError where the workers cannot fit."""
    train, cpus, gpus = config.train, cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    gpu = train.gpus_per_worker if train.gpus_per_worker is not None else float(gpus > 0)
    cpu = train.cpus_per_worker or max(0.5, int(100 * cpus / train.workers) / 100)
    for kind, each, there in (("cores", cpu, cpus), ("GPUs", gpu, gpus)):
        least = train.min_workers or train.workers
        if each * least > there + 1e-6:
            fits = int(there / each)
            raise UserError(
                f"{least} workers x {each:g} {kind} are asked, the cluster has {there:g} {kind}: "
                + (
                    f"use train.workers={fits} or less"
                    if fits
                    else "use train.gpus_per_worker=0 or another cluster.address"
                )
            )
    return {"CPU": cpu} | ({"GPU": gpu} if gpu else {})


def ray_train_worker(spec: dict[str, Any]) -> None:
    """Be one rank under Ray Train: take its place in the group and work."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    job = Job.from_dict(spec)
    run = RunFolder(job.config.run_dir)
    with (run.logs / f"worker-{rank}.log").open("a") as log:  # the chatter of all libraries in this process
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    import torch

    from engine.train.elastic import save_requests
    from engine.train.trainer import join
    from engine.train.watchdog import stack_on_signal
    from engine.train.worker import work

    if torch.cuda.is_available() is False:
        torch.set_num_threads(max(1, round(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    wants_save = save_requests() if rank == 0 else lambda: False
    try:
        with stack_on_signal(run.stacks(rank)):
            work(job, join(), wants_save=wants_save)
    except UserError as error:  # no restart would mend it
        (run.logs / "failed.txt").write_text(str(error))


class Watch:
    """Follows metrics.jsonl while the workers write it: the bar, the status, MLflow."""

    def __init__(self, run: RunFolder, config: Config, status: Status) -> None:
        """Follow `run`; the status starts as `status`."""
        self.run, self.config, self.status = run, config, status
        self._shown = self._rollbacks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        """Begin to follow."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Show what is left and close the MLflow run."""
        self._ending = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        tracked = None
        tail, told = MetricsTail(self.run.metrics_file), self.run.events
        heard = told.stat().st_size if told.exists() else 0
        with Bar(self.config.job, total=self.config.train.max_steps) as bar:
            while True:
                ending = self._stop.wait(0.2)
                heard = self._tell_events(heard)
                lines = self._new(tail.lines())
                if lines:
                    self._show(bar, lines[-1])
                    if self.config.tracking.enabled:
                        with suppress_tracking_errors():
                            if tracked is None:
                                from engine.train.tracking import TrackedRun

                                tracked = TrackedRun(self.config)
                            tracked.log(lines, int(time.time() * 1000))
                if ending:
                    break
        if tracked:
            with suppress_tracking_errors():
                tracked.end(self._ending)

    def _new(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out the lines that were shown before a restart; after a roll-back steps are new although taken before."""
        fresh = []
        for line in lines:
            rollbacks = line.get("rollbacks", 0)
            if line["step"] > self._shown or rollbacks > self._rollbacks:
                self._shown, self._rollbacks = line["step"], rollbacks
                fresh.append(line)
        return fresh

    def _tell_events(self, heard: int) -> int:
        """Print what befell the run since its events had `heard` bytes; return how many they have now."""
        if not self.run.events.exists():
            return heard
        with self.run.events.open("rb") as file:
            file.seek(heard)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for event in whole.decode().splitlines():
            console.print(f"warning: {event.split(' ', 2)[2]}", markup=False)  # an error's text may hold brackets
        return heard + len(whole)

    def _show(self, bar: Bar, line: dict[str, Any]) -> None:
        validation = next((f"  {k} {v:.4f}" for k, v in line.items() if k.startswith("validation_")), "")
        loss = self.status.loss if line["loss"] is None else line["loss"]
        told = f"skipped: {line.get('fault', 'no finite gradient')}" if line["loss"] is None else f"loss {loss:.4f}"
        counts = "".join(f"  {line[name]} {word}" for name, word in COUNTS.items() if line.get(name))
        bar.update(line["step"], f"{told}  {line['tokens_per_s']:,.0f} tokens/s{counts}{validation}")
        self.status = replace(self.status, step=line["step"], loss=loss, updated=now())
        with contextlib.suppress(OSError):  # a full disk
            self.run.write_status(self.status)


class suppress_tracking_errors:
    """Tell of a tracking server that fails, and go on: metrics.jsonl has everything."""

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        """Say once a failure what went wrong."""
        if error is not None and isinstance(error, Exception):
            console.print(
                f"warning: MLflow did not take the metrics ({str(error).splitlines()[0][:200]}); metrics.jsonl has them"
            )
            return True
        return False

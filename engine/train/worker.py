"""One training worker (rank): set up the model, resume or initialize, fit, and export a bundle. Does not use Ray."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config import Config, fingerprint, identity, replace
from engine.data.manifest import Manifest
from engine.data.order import DataOrder
from engine.data.packing import Mix
from engine.data.shards import Split
from engine.models.lora import merge_lora, write_adapter
from engine.objectives.contract import Objective
from engine.train import hardware
from engine.train.checkpoint import Checkpoint, CheckpointWriter, latest_valid, step_folder
from engine.train.energy import EnergyMeter, total_energy
from engine.train.init_model import ModelFactory, apply_optimizations, load_weights, make_model, start_model
from engine.train.job import TrainJob
from engine.train.loop import Metrics, TrainingRun, fit
from engine.train.meter import StepMeter
from engine.train.micro_batch import find_micro_batch
from engine.train.process_group import ProcessGroup
from engine.train.profile import StepProfiler
from engine.train.requirements import check_machine
from engine.train.run_folder import MetricsLog, RunFolder, adapter_folder
from engine.train.sequence_parallel import SequenceParallel
from engine.train.train_state import INITIAL_LOSS_SCALE, TrainState
from engine.train.watchdog import Heartbeat
from engine.train.zero import DTYPES, EMA, ZeroModel


def train_worker(
    job: TrainJob,
    group: ProcessGroup,
    on_step: Callable[[Metrics], None] | None = None,
    is_save_requested: Callable[[], bool] = lambda: False,
    model_factory: ModelFactory | None = None,
) -> Metrics:
    """Run one rank of a job to its end, from its latest valid checkpoint if there is one; return the last metrics.

    `on_step` is called with this rank's metrics after each step. `is_save_requested` is polled in each step; when it
    returns True, a checkpoint is saved. `model_factory` replaces `load_or_init` for the initial model. With several ranks
    torch's process group must be initialized.
    """
    config, folder = job.config, RunFolder(job.config.run_dir)
    check_machine(config)
    heartbeat = Heartbeat(folder.heartbeat(group.rank), config.train.hang_timeout_s)
    precision = hardware.precision(config.train)
    objective, manifest = job.objective(), Manifest.load(job.data_folder)
    samples = objective.samples(Split.open(job.data_folder, "train"))
    has_validation = "validation" in manifest.splits
    order = DataOrder(len(samples), config.global_batch, config.seed, endless=isinstance(samples, Mix))

    sequence = SequenceParallel(group, config.train.sequence_parallel, objective.is_causal)
    model, checkpoint, flops_per_token = setup_model(job, objective, group, precision, sequence, model_factory)
    state = checkpoint.state if checkpoint else TrainState()
    if precision == "fp16" and state.loss_scale is None:  # a converted checkpoint has none either
        state = dataclasses.replace(state, loss_scale=INITIAL_LOSS_SCALE)
    meter = make_meter(group, DTYPES[precision], flops_per_token)
    model.time_collectives(meter)
    constants = {"padding": samples.padding} if config.data.packing != "end_to_end" else {}  # type: ignore[attr-defined]
    log = StepLogger(folder, config, group, meter, state.step, constants, on_step)
    run = TrainingRun(
        config=config,
        group=group,
        objective=objective,
        model=model,
        samples=samples,
        validation=objective.samples(Split.open(job.data_folder, "validation")) if has_validation else None,
        order=order,
        writer=CheckpointWriter(
            folder.checkpoints, group.rank, group.world_size, config.train.keep_checkpoints, config.train.keep_best
        ),
        checkpoint_info={"config": fingerprint(config), "data": manifest.hash},
        log=log,
        meter=meter,
        sequence=sequence,
        state=state,
        saved_step=state.step if checkpoint else -1,
        heartbeat=heartbeat,
        is_save_requested=is_save_requested,
    )
    if config.train.micro_batch is None:
        run.config = replace(config, train__micro_batch=find_micro_batch(run))
    try:
        with log:
            fit(run)
    finally:
        run.writer.wait()
        if not job.exports_bundle:  # a trial's process goes on, and DeepSpeed's gradient hooks would keep its weights
            model.engine.destroy()
    if group.rank == 0 and job.exports_bundle:
        step = run.state.best_step if config.train.keep_best and run.state.best_step else run.state.step
        line = next(line for line in folder.metrics() if line["step"] == step)
        export_bundle(job, objective, step_folder(folder.checkpoints, step), DTYPES[precision], line)
    group.barrier()
    heartbeat.remove()
    return log.last_metrics


def setup_model(
    job: TrainJob,
    objective: Objective,
    group: ProcessGroup,
    precision: str,
    sequence: SequenceParallel,
    model_factory: ModelFactory | None,
) -> tuple[ZeroModel, Checkpoint | None, float]:
    """Return the ZeRO model with weights and optimizer state, the checkpoint they are from, if any, and flops per token."""
    config = job.config
    checkpoint = latest_valid(RunFolder(config.run_dir), group)
    model = start_model(job, objective, group, checkpoint, model_factory)
    objective.bind_model(model.config)
    flops_per_token = objective.flops(model) / sum(stack.tokens for stack in objective.transformer_stacks(model.config))
    if sequence.size > 1:
        sequence.attach(model)
    apply_optimizations(model, config.train, group.device, precision)
    if config.zero.stage < 3:
        model.to(group.device)
    else:  # ZeRO 3 moves each weight as it shards it
        for buffer in model.buffers():
            buffer.data = buffer.data.to(group.device)
    zero_model = ZeroModel(model, config, group.world_size, precision)
    zero_model.init_optimizer_state(checkpoint.state.updates if checkpoint else 0)
    if checkpoint:
        checkpoint.load(zero_model.fragments(group.rank, owned=False))
    group.barrier()
    return zero_model, checkpoint, flops_per_token


class StepLogger:
    """Logs the metrics of each step: rank 0 writes them to metrics.jsonl with the energy used; the profiler gets them too."""

    def __init__(
        self, folder: RunFolder, config: Config, group: ProcessGroup, meter: StepMeter, step: int, constants: Metrics,
        on_step: Callable[[Metrics], None] | None,
    ) -> None:  # fmt: skip
        """Start after `step` steps; `constants` are added to each line, and `on_step` is called with it."""
        self.last_metrics: Metrics = {}
        self._constants, self._on_step = constants, on_step
        self._file = MetricsLog(folder, step) if group.rank == 0 else None
        self._energy = EnergyMeter(group.device, group.world_size)
        steps_left = config.train.max_steps - step
        self._profiler = (
            StepProfiler(folder.profile, config.name, group, meter, steps_left)
            if config.profile and steps_left > 0
            else None
        )

    def __call__(self, metrics: Metrics) -> None:
        """Log one step."""
        self.last_metrics = metrics | self._constants | (self._energy.lap() if self._file else {})
        if self._profiler:
            self._profiler(self.last_metrics)
        if self._file:
            self._file(self.last_metrics)
        if self._on_step:
            self._on_step(self.last_metrics)

    def __enter__(self) -> StepLogger:
        """Do nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left."""
        if self._profiler:
            self._profiler.finish()
        if self._file:
            self._file.close()


_matmul_peak = functools.cache(hardware.matmul_peak)  # a process that trains several trials measures once


def make_meter(group: ProcessGroup, dtype: torch.dtype, flops_per_token: float) -> StepMeter:
    """Measure the hardware's matrix-product rate, and return a meter that uses it."""
    datasheet = hardware.datasheet_flops(group.device, dtype)
    peak = _matmul_peak(group.device, dtype) * group.world_size
    return StepMeter(group.device, flops_per_token, peak, datasheet * group.world_size if datasheet else None)


def export_bundle(
    job: TrainJob, objective: Objective, checkpoint: Path, dtype: torch.dtype, line: Metrics, folder: Path | None = None
) -> None:
    """Write a checkpoint as a bundle, to `folder` or else the run's; `line` is the logged line of the checkpoint's step."""
    from engine.bundles.bundle import Bundle, BundleInfo, write_bundle  # not needed before the first step

    folder, model = folder or RunFolder(job.config.run_dir).bundle, make_model(job, objective)
    load_weights(model, Checkpoint(checkpoint), EMA if job.config.train.use_ema else "weight")
    if job.config.objective.lora.rank:
        write_adapter(
            model, job.config.objective.lora, str(job.start_bundle), adapter_folder(folder), objective.peft_task_type
        )
        merge_lora(model)
    manifest = Manifest.load(job.data_folder)
    split = "validation" if "validation" in manifest.splits else "train"
    write_bundle(
        folder,
        model,
        objective,
        BundleInfo(
            name=job.config.name,
            golden_requests=objective.golden_requests(Split.open(job.data_folder, split)),
            parent=Bundle.open(job.start_bundle).hash if job.start_bundle else None,
            data={"folder": str(job.data_folder), "hash": manifest.hash},
            config_hash=fingerprint(job.config),
            run={"name": job.config.name, "step": line["step"], "samples_hash": line["samples_hash"]},
            evaluation={name: value for name, value in line.items() if name.startswith("validation_")},
            license=job.config.card.license or manifest.license,
            training=training_summary(job, line),
            intended_use=job.config.card.intended_use or "",
            limits=job.config.card.limits or "",
        ),
        dtype,
    )


def training_summary(job: TrainJob, line: Metrics) -> dict[str, Any]:
    """Return a bundle's record of its training up to the step of `line`: config, tokens, energy."""
    lines = [past for past in RunFolder(job.config.run_dir).metrics() if past["step"] <= line["step"]]
    config, energy = identity(job.config), total_energy(lines)
    return {"job": job.config.job, "config": config, "tokens": line["tokens"], "energy": energy}


def single_process_group() -> ProcessGroup:
    """Return the group of a job with a single process, with the torch process group that DeepSpeed requires."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    return ProcessGroup(0, 1, device)

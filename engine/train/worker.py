"""What one training process does: set up, resume or begin, fit, and leave a bundle. Ray-free."""

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
from engine.data.order import Order
from engine.data.packing import Mix
from engine.data.shards import Split
from engine.models.lora import merge_lora, write_adapter
from engine.objectives.contract import Objective
from engine.train import hardware
from engine.train.checkpoint import Checkpoint, CheckpointWriter, latest_whole, step_folder
from engine.train.energy import EnergyMeter, total
from engine.train.process_group import Group
from engine.train.init_model import Make, equip, load_weights, make_model, start_model
from engine.train.job import Job
from engine.train.loop import Metrics, Run, fit
from engine.train.meter import Meter
from engine.train.micro_batch import fitting_micro_batch
from engine.train.profile import Profile
from engine.train.requirements import check_machine
from engine.train.run_folder import MetricsLog, RunFolder, adapter_of
from engine.train.sequence_parallel import SequenceParallel
from engine.train.train_state import INITIAL_LOSS_SCALE, TrainState
from engine.train.watchdog import Heartbeat
from engine.train.zero import AVERAGE, DTYPES, ZeroModel


def work(
    job: Job,
    group: Group,
    listen: Callable[[Metrics], None] | None = None,
    wants_save: Callable[[], bool] = lambda: False,
    make: Make | None = None,
) -> Metrics:
    """Run one rank of a job to its end, from its latest whole checkpoint if there is one; return the last metrics.

    `listen` hears this rank's metrics of each step; `wants_save` is asked in each step whether a checkpoint is wanted at
    once; `make` makes the start state in another way than `fresh`. The process group must be up where there are
    several ranks.
    """
    config, folder = job.config, RunFolder(job.config.run_dir)
    check_machine(config)
    heart = Heartbeat(folder.heartbeat(group.rank), config.train.hang_timeout_s)
    precision = hardware.precision(config.train)
    objective, manifest = job.objective(), Manifest.load(job.data)
    samples = objective.samples(Split.open(job.data, "train"))
    order = Order(len(samples), config.global_batch, config.seed, endless=isinstance(samples, Mix))

    sequence = SequenceParallel(group, config.train.sequence_parallel, objective.auto_class == "AutoModelForCausalLM")

    model, checkpoint, flops_per_token = begin(job, objective, group, precision, sequence, make)
    state = checkpoint.state if checkpoint else TrainState()
    if precision == "fp16" and state.loss_scale is None:  # a checkpoint that was converted has none either
        state = dataclasses.replace(state, loss_scale=INITIAL_LOSS_SCALE)
    meter = measure(group, DTYPES[precision], flops_per_token)
    model.time_collectives(meter)
    waste = {"padding": samples.padding} if config.data.packing != "end_to_end" else {}  # type: ignore[attr-defined]
    log = Log(folder, config, group, meter, state.step, waste, listen)
    run = Run(
        config=config,
        group=group,
        objective=objective,
        model=model,
        samples=samples,
        validation=objective.samples(Split.open(job.data, "validation")) if "validation" in manifest.splits else None,
        order=order,
        writer=CheckpointWriter(
            folder.checkpoints, group.rank, group.world, config.train.keep_checkpoints, config.train.keep_best
        ),
        about={"config": fingerprint(config), "data": manifest.hash},
        log=log,
        meter=meter,
        sequence=sequence,
        state=state,
        saved_step=state.step if checkpoint else -1,
        heart=heart,
        wants_save=wants_save,
    )
    if config.train.micro_batch is None:
        run.config = replace(config, train__micro_batch=fitting_micro_batch(run))
    try:
        with log:
            fit(run)
    finally:
        run.writer.wait()
        if not job.leaves_bundle:  # a trial's process goes on, and the hooks on its gradients would keep its weights
            model.engine.destroy()
    if group.rank == 0 and job.leaves_bundle:
        chosen = run.state.best_step if config.train.keep_best and run.state.best_step else run.state.step
        line = next(line for line in folder.metrics() if line["step"] == chosen)
        export(job, objective, step_folder(folder.checkpoints, chosen), DTYPES[precision], line)
    group.barrier()
    heart.end()
    return log.last


def begin(
    job: Job, objective: Objective, group: Group, precision: str, sequence: SequenceParallel, make: Make | None
) -> tuple[ZeroModel, Checkpoint | None, float]:
    """Return the sharded model in its start state, the checkpoint that it is from, if any, and the flops of a token."""
    config = job.config
    checkpoint = latest_whole(RunFolder(config.run_dir), group)
    model = start_model(job, objective, group, checkpoint, make)
    objective.bind_model(model.config)
    flops_per_token = objective.flops(model) / sum(stack.tokens for stack in objective.transformer_stacks(model.config))
    if sequence.size > 1:
        sequence.attach(model)
    equip(model, config.train, group.device, precision)
    if config.zero.stage < 3:
        model.to(group.device)
    else:  # weights go there one by one, as they are sharded
        for buffer in model.buffers():
            buffer.data = buffer.data.to(group.device)
    sharded = ZeroModel(model, config, group.world, precision)
    sharded.ensure_moments(checkpoint.state.updates if checkpoint else 0)
    if checkpoint:
        checkpoint.load(sharded.fragments(group.rank, owned=False))
    group.barrier()
    return sharded, checkpoint, flops_per_token


class Log:
    """Hears the metrics of each step: rank 0 writes them, with what the step took of energy; a profile may listen too."""

    def __init__(
        self, folder: RunFolder, config: Config, group: Group, meter: Meter, step: int, constants: Metrics,
        listen: Callable[[Metrics], None] | None,
    ) -> None:  # fmt: skip
        """Begin after `step` steps; `constants` are said in each line, and `listen` hears it."""
        self.last: Metrics = {}
        self._constants, self._listen = constants, listen
        self._file = MetricsLog(folder, step) if group.rank == 0 else None
        self._energy = EnergyMeter(group.device, group.world)
        left = config.train.max_steps - step
        self._profile = (
            Profile(folder.profile, config.name, group, meter, left) if config.profile and left > 0 else None
        )

    def __call__(self, metrics: Metrics) -> None:
        """Hear of a step."""
        self.last = metrics | self._constants | (self._energy.lap() if self._file else {})
        if self._profile:
            self._profile(self.last)
        if self._file:
            self._file(self.last)
        if self._listen:
            self._listen(self.last)

    def __enter__(self) -> Log:
        """Do nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left."""
        if self._profile:
            self._profile.finish()
        if self._file:
            self._file.close()


_peak = functools.cache(hardware.matmul_peak)  # a process that trains again need not measure again


def measure(group: Group, dtype: torch.dtype, flops_per_token: float) -> Meter:
    """Measure what the hardware can do, and make the run's meter of it."""
    datasheet = hardware.datasheet_flops(group.device, dtype)
    peak = _peak(group.device, dtype) * group.world
    return Meter(group.device, flops_per_token, peak, datasheet * group.world if datasheet else None)


def export(
    job: Job, objective: Objective, checkpoint: Path, dtype: torch.dtype, line: Metrics, folder: Path | None = None
) -> None:
    """Write a bundle, the run's or at `folder`, from a checkpoint, whatever layout wrote that; `line` is what was logged of its step."""
    from engine.bundles.bundle import Bundle, write_bundle  # not before the first step

    folder, model = folder or RunFolder(job.config.run_dir).bundle, make_model(job, objective)
    load_weights(model, Checkpoint(checkpoint), AVERAGE if job.config.train.use_ema else "weight")
    if job.config.objective.lora.rank:
        write_adapter(model, job.config.objective.lora, str(job.start), adapter_of(folder))
        merge_lora(model)
    manifest = Manifest.load(job.data)
    split = "validation" if "validation" in manifest.splits else "train"
    write_bundle(
        folder,
        model=model,
        objective=objective,
        name=job.config.name,
        golden_requests=objective.golden_requests(Split.open(job.data, split)),
        parent=Bundle.open(job.start).hash if job.start else None,
        data={"folder": str(job.data), "hash": manifest.hash},
        config_hash=fingerprint(job.config),
        run={"name": job.config.name, "step": line["step"], "samples_hash": line["samples_hash"]},
        evaluation={name: value for name, value in line.items() if name.startswith("validation_")},
        dtype=dtype,
        license=job.config.card.license or manifest.license,
        training=training_facts(job, line),
        words={"intended_use": job.config.card.intended_use or "", "limits": job.config.card.limits or ""},
    )


def training_facts(job: Job, line: Metrics) -> dict[str, Any]:
    """Return what a bundle tells of its training up to the step of `line`: the config, the tokens, the energy."""
    lines = [one for one in RunFolder(job.config.run_dir).metrics() if one["step"] <= line["step"]]
    config, energy = identity(job.config), total(lines)
    return {"job": job.config.job, "config": config, "tokens": line["tokens"], "energy": energy}


def local_group() -> Group:
    """Return the group of a job in a single process, with the process group that DeepSpeed asks for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    return Group(0, 1, device)

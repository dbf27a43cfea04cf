"""What one training process does: set up, resume or begin, fit, and leave a bundle. Ray-free."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config import Config, fingerprint, from_dict, to_dict
from engine.data.manifest import Manifest
from engine.data.order import Order
from engine.data.shards import Split
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.models.build import build, freeze_layers, load
from engine.models.size import flops_per_token
from engine.objectives.contract import Objective, objective_class
from engine.train import hardware
from engine.train.checkpoint import Checkpoint, CheckpointWriter, latest_whole, step_folder
from engine.train.group import Group
from engine.train.loop import Metrics, Run, fit
from engine.train.run_folder import MetricsLog, RunFolder
from engine.train.state import TrainState
from engine.train.watchdog import Heartbeat
from engine.train.zero import Sharded


@dataclass(frozen=True)
class Job:
    """One training job: a config with its model and objective, a data order, a start state."""

    config: Config
    data: Path  # folder of the prepared data
    start: Path | None = None  # folder of the bundle to start from; None: fresh weights

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the way to another process."""
        return {"config": to_dict(self.config), "data": str(self.data), "start": self.start and str(self.start)}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Job:
        """Read what `to_dict` wrote."""
        return cls(from_dict(tree["config"]), Path(tree["data"]), tree["start"] and Path(tree["start"]))

    def objective(self) -> Objective:
        """Return the task, with the data's tokenizer and labels."""
        labels = Manifest.load(self.data).labels
        tokenizer = load_tokenizer(self.data / "tokenizer")
        options = self.config.objective
        return objective_class(options.name)(options, tokenizer, self.config.data.sequence_length, labels)


def work(
    job: Job,
    group: Group,
    listen: Callable[[Metrics], None] | None = None,
    wants_save: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Run one rank of a job to its end, from its latest whole checkpoint if there is one; return the last metrics.

    `listen` hears rank 0's metrics of each step; `wants_save` is asked in each step whether a checkpoint is wanted at
    once. The process group must be up where there are several ranks.
    """
    config, folder = job.config, RunFolder(job.config.run_dir)
    heart = Heartbeat(folder.heartbeat(group.rank), config.train.hang_timeout_s)
    precision = hardware.precision(config.train)
    objective, manifest = job.objective(), Manifest.load(job.data)
    samples = objective.samples(Split.open(job.data, "train"))
    order = Order(len(samples), config.train.global_batch, config.seed)

    # The order: resume, else start from the bundle, else initialize.
    checkpoint = latest_whole(folder, group)
    model = make_model(job, objective)
    if checkpoint:
        fill(model, checkpoint)
    freeze_layers(model, config.objective.frozen_layers)
    flops = flops_per_token(model, model.config, config.data.sequence_length)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if config.train.compile:
        model.compile()
    sharded = Sharded(model.to(group.device), config, group.world, precision)
    sharded.ensure_moments(checkpoint.state.updates if checkpoint else 0)
    if checkpoint:
        checkpoint.load(sharded.fragments(group.rank, owned=False))
    group.barrier()

    state = checkpoint.state if checkpoint else TrainState()
    log = MetricsLog(folder, state.step) if group.rank == 0 else None
    last: Metrics = {}

    def heard(metrics: Metrics) -> None:
        last.update(metrics)
        if log:
            log(metrics)
            if listen:
                listen(metrics)

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    run = Run(
        config=config,
        group=group,
        objective=objective,
        model=sharded,
        samples=samples,
        validation=objective.samples(Split.open(job.data, "validation")) if "validation" in manifest.splits else None,
        order=order,
        writer=CheckpointWriter(
            folder.checkpoints, group.rank, group.world, config.train.keep_checkpoints, config.train.keep_best
        ),
        about={"config": fingerprint(config), "data": manifest.hash},
        log=heard,
        flops_per_token=flops,
        peak_flops=hardware.matmul_peak(group.device, dtype) * group.world,
        state=state,
        saved_step=state.step if checkpoint else -1,
        heart=heart,
        wants_save=wants_save,
    )
    try:
        fit(run)
    finally:
        if log:
            log.close()
    if group.rank == 0 and last:
        chosen = run.state.best_step if config.train.keep_best and run.state.best_step else run.state.step
        line = next(line for line in folder.metrics() if line["step"] == chosen)
        export(job, objective, step_folder(folder.checkpoints, chosen), dtype, line)
    group.barrier()
    return last


def make_model(job: Job, objective: Objective) -> Any:
    """Make the start state: the bundle's weights, else fresh ones from the seed."""
    config, options = job.config, objective.model_options()
    if job.start:
        return load(job.start, objective.auto_class, options, config.model, config.seed)
    return build(config.model, objective.tokenizer, objective.auto_class, options, config.seed)


@torch.no_grad()
def fill(model: Any, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a whole fp32 model. Raises UserError where it is another model's."""
    weights = checkpoint.weights()
    for name, parameter in model.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(
                f"{checkpoint.folder} holds another model ({name} differs): use another name=..., or the model's former options"
            )
        parameter.copy_(weights[name])


def export(job: Job, objective: Objective, checkpoint: Path, dtype: torch.dtype, line: Metrics) -> None:
    """Write the run's bundle from a checkpoint, whatever layout wrote that; `line` is what was logged of its step."""
    from engine.bundles.bundle import Bundle, write_bundle  # not before the first step

    model = make_model(job, objective)
    fill(model, Checkpoint(checkpoint))
    manifest = Manifest.load(job.data)
    split = "validation" if "validation" in manifest.splits else "train"
    write_bundle(
        job.config.run_dir / "bundle",
        model=model,
        tokenizer=objective.tokenizer,
        objective=objective,
        name=job.config.name,
        golden_requests=objective.golden_requests(Split.open(job.data, split)),
        parent=Bundle.open(job.start).hash if job.start else None,
        data={"folder": str(job.data), "hash": manifest.hash},
        config_hash=fingerprint(job.config),
        run={"name": job.config.name, "step": line["step"], "samples_hash": line["samples_hash"]},
        evaluation={name: value for name, value in line.items() if name.startswith("validation_")},
        dtype=dtype,
    )


def local_group() -> Group:
    """Return the group of a job in a single process, with the process group that DeepSpeed asks for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    return Group(0, 1, device)

"""The plan of a training job: memory, step time, size. Built on the meta device, so no weight is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.table import Table

from engine.config import Config
from engine.errors import UserError
from engine.models.build import freeze_layers, transformers_config
from engine.models.size import flops_per_token, parameter_count
from engine.objectives.contract import objective_class
from engine.plan.memory import MemoryPlan, memory
from engine.progress import console
from engine.train.hardware import matmul_peak, precision

ASSUMED_MFU = 0.4  # share of the matrix-product peak that a training step reaches


@dataclass(frozen=True)
class Plan:
    """What a job needs. All of it is computed, but for `peak_flops`, which is measured."""

    parameters: int
    trained: int  # parameters that aren't frozen
    flops_per_token: float  # forward + backward
    tokens_per_step: int
    precision: str
    stages: dict[int, MemoryPlan]  # by ZeRO stage: one worker's
    peak_flops: float  # FLOP/s of a matrix product on this machine
    step_s: float  # seconds, at ASSUMED_MFU of that peak
    total_s: float  # seconds of train.max_steps
    checkpoint_bytes: int


def plan(config: Config) -> Plan:
    """Compute the plan of a config. A model without model.vocab_size is given data.vocab_size.

    Raises UserError for an unknown architecture, or for a sequence that is longer than the model's positions.
    """
    shape = model_shape(config)
    positions = getattr(shape, "max_position_embeddings", None)
    if positions and config.data.sequence_length > positions:
        raise UserError(
            f"sequence length {config.data.sequence_length:,} is over the model's {positions:,} positions: "
            f"use data.sequence_length={positions}"
        )
    with torch.device("meta"):
        model = getattr(transformers, objective_class(config.objective.name).auto_class).from_config(shape)
    freeze_layers(model, config.objective.frozen_layers)
    parameters, kind = parameter_count(model), precision(config.train)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matmul_peak(device, torch.bfloat16 if kind == "bf16" else torch.float32)
    together = config.train.workers if device.type == "cuda" else 1  # CPU workers share the cores that were measured
    flops = flops_per_token(model, shape, config.data.sequence_length)
    tokens = config.train.global_batch * config.data.sequence_length
    step_s = tokens * flops / (ASSUMED_MFU * peak * together)
    return Plan(
        parameters=parameters,
        trained=trained,
        flops_per_token=flops,
        tokens_per_step=tokens,
        precision=kind,
        stages={stage: memory(config, shape, parameters, trained, stage, kind) for stage in range(4)},
        peak_flops=peak,
        step_s=step_s,
        total_s=step_s * config.train.max_steps,
        checkpoint_bytes=4 * parameters + 8 * trained,
    )


def model_shape(config: Config) -> Any:
    """Return the transformers config of config.bundle (a folder or a run), else of `model.*`. Raises UserError if it is neither."""
    if config.bundle:
        places = (Path(config.bundle), Path(config.runs_dir) / config.bundle / "bundle")
        folder = next((place for place in places if (place / "config.json").is_file()), None)
        if folder is None:
            raise UserError(
                f"bundle={config.bundle} is neither a model's folder nor a run with a bundle: a plan needs one of these"
            )
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return transformers_config(config.model, Vocabulary(config.model.vocab_size or config.data.vocab_size), {})


@dataclass(frozen=True)
class Vocabulary:
    """Stands for a tokenizer of which only the size is known yet."""

    size: int
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    def __len__(self) -> int:
        return self.size


def plan_and_show(config: Config) -> None:
    """Compute the plan and print it."""
    found = plan(config)
    frozen = f" ({found.parameters - found.trained:,} of them frozen)" if found.trained < found.parameters else ""
    workers = f"{config.train.workers} worker{'s' if config.train.workers > 1 else ''}"
    console.print(
        f"{found.parameters:,} parameters{frozen}, {found.flops_per_token / 1e6:,.1f} MFLOP a token, "
        f"{found.tokens_per_step:,} tokens a step, {found.precision}, {workers} of {config.micro_batch} samples a forward"
    )
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "total", "host")
    unit, scale = ("GiB", 2**30) if found.stages[0].total >= 2**30 else ("MiB", 2**20)
    title = f"memory of a worker by ZeRO stage, {unit} (computed)"
    table = Table("", *kinds, title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for stage, need in found.stages.items():
        mark = "*" if stage == config.zero.stage else " "
        table.add_row(f"{stage}{mark}", *(f"{getattr(need, kind) / scale:,.2f}" for kind in kinds))
    console.print(table)
    console.print(
        f"step time   {duration(found.step_s)}, {config.train.max_steps:,} steps {duration(found.total_s)} (computed from the "
        f"measured matmul peak, {found.peak_flops / 1e9:,.0f} GFLOP/s, at an assumed MFU of {100 * ASSUMED_MFU:.0f} %)"
    )
    console.print(f"checkpoint  {size(found.checkpoint_bytes)} (computed: fp32 weights and two moments)")


def size(count: float) -> str:
    """Return bytes in their largest unit, powers of 1,024."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} B"


def duration(seconds: float) -> str:
    """Return seconds in their largest unit."""
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.3g} s"

"""The plan of a training job: memory, step time, size. Built on the meta device, so no weight is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from rich.table import Table

from engine.config import Config
from engine.models.build import transformers_config
from engine.models.size import flops_per_token, parameter_count
from engine.objectives.contract import objective_class
from engine.plan.memory import MemoryPlan, memory
from engine.progress import console
from engine.train.hardware import matmul_peak, precision

ASSUMED_MFU = 0.4  # share of the matrix-product peak that a training step reaches


@dataclass(frozen=True)
class Plan:
    """What a job needs."""

    parameters: int
    flops_per_token: float
    tokens_per_step: int
    precision: str
    stages: dict[int, MemoryPlan]  # by ZeRO stage, a worker's
    peak_flops: float  # FLOP/s of a matrix product on this machine, measured
    step_s: float  # seconds, computed at ASSUMED_MFU of that peak a worker
    checkpoint_bytes: int


def plan(config: Config) -> Plan:
    """Compute the plan of a config. A model without model.vocab_size is given data.vocab_size."""
    vocabulary = config.model.vocab_size or config.data.vocab_size
    shape = transformers_config(config.model, Vocabulary(vocabulary), {})
    with torch.device("meta"):
        model = getattr(transformers, objective_class(config.objective.name).auto_class).from_config(shape)
    parameters, kind = parameter_count(model), precision(config.train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matmul_peak(device, torch.bfloat16 if kind == "bf16" else torch.float32)
    flops = flops_per_token(model, shape, config.data.sequence_length)
    tokens = config.train.global_batch * config.data.sequence_length
    sharing = config.train.workers if device.type == "cpu" else 1  # CPU workers share the machine's cores
    return Plan(
        parameters=parameters,
        flops_per_token=flops,
        tokens_per_step=tokens,
        precision=kind,
        stages={stage: memory(config, shape, parameters, vocabulary, stage, kind) for stage in range(4)},
        peak_flops=peak,
        step_s=tokens * flops * sharing / (ASSUMED_MFU * peak * config.train.workers),
        checkpoint_bytes=12 * parameters,
    )


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
    console.print(
        f"{found.parameters:,} parameters, {found.flops_per_token / 1e6:,.1f} MFLOP a token, "
        f"{found.tokens_per_step:,} tokens a step, {found.precision}, {config.train.workers} workers"
    )
    table = Table(
        "ZeRO stage", "weights", "gradients", "optimizer", "activations", "logits", "total a worker",
        title="memory a worker (computed)", title_justify="left",
    )  # fmt: skip
    for stage, need in found.stages.items():
        parts = (need.weights, need.gradients, need.optimizer, need.activations, need.logits, need.total)
        table.add_row(f"{stage}{' *' if stage == config.zero.stage else ''}", *(size(part) for part in parts))
    console.print(table)
    total = found.step_s * config.train.max_steps
    console.print(
        f"step time {found.step_s:.3g} s, {config.train.max_steps:,} steps {total / 60:,.1f} min "
        f"(computed: {ASSUMED_MFU:.0%} of this machine's measured matrix-product peak, {found.peak_flops / 1e9:,.0f} GFLOP/s)"
    )
    console.print(f"a checkpoint has {size(found.checkpoint_bytes)} (computed: fp32 weights and two moments)")


def size(count: float) -> str:
    """Return bytes in their largest unit, powers of 1,024."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} B"

"""The plan of a training job: memory, step time, checkpoint size. The model is built on the meta device, without weights."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.table import Table

from engine.config import Config, replace
from engine.errors import UserError
from engine.models.build import (
    POSITIONS_PER_SECOND,
    InputSpec,
    load_or_make_config,
    make_config,
    model_from_config,
    quiet_transformers,
)
from engine.models.trainable import select_trainable
from engine.objectives.contract import objective_class
from engine.plan.memory import FP32, ModelSizes, WorkerMemory, peak_memory, runs_on_cpu
from engine.progress import console
from engine.train.devices import DEVICES, RESERVED_FRACTION
from engine.train.hardware import matmul_peak, precision

WRITE_RATE = 1e9  # bytes per second of a worker: assumed, of one NVMe drive or a share of a parallel file system
MALLOC_RESERVE = 0.2  # fraction of main memory for freed blocks that malloc doesn't return: measured
# Cost of a step with activation checkpointing, which runs the forward pass twice (Korthikanti et al. 2022).
RECOMPUTE_FACTOR = 4 / 3


@dataclass(frozen=True)
class Plan:
    """What a job needs. Everything is computed, except `peak_flops` and `write_rate` with plan.device=here, which are measured."""

    sizes: ModelSizes
    flops_per_token: float  # forward + backward
    tokens_per_step: int
    precision: str
    stages: dict[str, tuple[Config, WorkerMemory]]  # by name: a layout's config, and one worker's memory
    peak_flops: float  # FLOP/s of a matrix product on a worker's device
    device_bytes: float  # usable memory of a worker's device
    layout: Config | None  # the config with the fastest layout that fits; None: none fits
    step_s: float  # seconds of a step, at plan.mfu of that peak
    total_s: float  # seconds of plan.tokens, or of train.max_steps
    checkpoint_bytes: int
    write_rate: float  # bytes per second of one worker
    write_s: float  # seconds to write a checkpoint, by all workers in parallel, in the background of the steps

    @property
    def layout_memory(self) -> WorkerMemory | None:
        """The memory of a worker in the fastest layout that fits."""
        return None if self.layout is None else self.memory_of(self.layout)

    def memory_of(self, layout: Config) -> WorkerMemory:
        """Return the memory of a worker in a layout."""
        return peak_memory(layout, self.sizes, layout.zero.stage, self.precision)


def plan(config: Config) -> Plan:
    """Compute the plan of a config. Without model.vocab_size the model has data.vocab_size.

    Raises UserError for an unknown architecture, or for a sequence that is longer than the model's positions.
    """
    model_config = make_model_config(config)
    objective = objective_class(config.objective.name)
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions and config.data.sequence_length > positions:
        raise UserError(
            f"sequence length {config.data.sequence_length:,} is over the model's {positions:,} positions: "
            f"use data.sequence_length={positions}"
        )
    model = meta_model(config)
    sizes = ModelSizes.from_model(model, config)
    dtype = precision(config.train) if config.plan.device == "here" else "bf16"
    peak, usable_bytes, devices = device_of(config, dtype)
    tokens = config.global_batch * sum(stack.tokens for stack in sizes.stacks)

    def bytes_needed(layout: Config) -> float:
        need = peak_memory(layout, sizes, layout.zero.stage, dtype)
        return need.total + (need.host if runs_on_cpu(config) else 0)

    layout = fastest_layout(config, lambda layout: bytes_needed(layout) <= usable_bytes)
    recompute = RECOMPUTE_FACTOR if (layout or config).train.activation_checkpointing else 1.0
    flops = objective(config.objective, None, config.data.sequence_length).flops(model) * config.global_batch / tokens
    step_s = tokens * flops * recompute / (config.plan.mfu * peak * devices)
    steps = config.plan.tokens / tokens if config.plan.tokens else config.train.max_steps
    checkpoint = FP32 * (sizes.parameters + sizes.moment_elements + (sizes.trainable if config.train.ema else 0))
    rate = write_rate(config)
    return Plan(
        sizes=sizes,
        flops_per_token=flops,
        tokens_per_step=tokens,
        precision=dtype,
        stages={name: (c, peak_memory(c, sizes, c.zero.stage, dtype)) for name, c in zero_layouts(config).items()},
        peak_flops=peak,
        device_bytes=usable_bytes,
        layout=layout,
        step_s=step_s,
        total_s=step_s * steps,
        checkpoint_bytes=checkpoint,
        write_rate=rate,
        write_s=checkpoint / (rate * config.train.workers),
    )


def zero_layouts(config: Config) -> dict[str, Config]:
    """Return the config at each ZeRO stage, without and with offload, by the name of the layout."""
    result = {}
    for stage in range(4):
        for offload in (False, True)[: 2 if stage else 1]:
            target = "cpu" if offload else "none"
            result[f"{stage} offload" if offload else str(stage)] = replace(
                config,
                zero__stage=stage,
                zero__offload_optimizer=target,
                zero__offload_param=target if stage == 3 else "none",
            )
    return result


def write_rate(config: Config) -> float:
    """Return the bytes per second that one worker writes: plan.write_rate, else measured (plan.device=here) or assumed."""
    if config.plan.write_rate:
        return config.plan.write_rate
    if config.plan.device != "here":
        return WRITE_RATE
    folder = next(folder for folder in (Path(config.runs_dir), Path()) if folder.is_dir())
    block = bytes(2**24)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(4):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 4 * len(block) / (time.perf_counter() - started) / config.train.workers


def device_of(config: Config, dtype: str) -> tuple[float, float, int]:
    """Return a device's FLOP/s and usable bytes, and the number of devices."""
    if config.plan.device != "here":
        device = DEVICES[config.plan.device]
        return device.flops, device.bytes * (1 - RESERVED_FRACTION), config.train.workers
    cuda = torch.cuda.is_available()
    peak = matmul_peak(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if dtype == "bf16" else torch.float32)
    if cuda:
        return peak, torch.cuda.get_device_properties(0).total_memory * (1 - RESERVED_FRACTION), config.train.workers
    # On a CPU the workers share the cores and the memory.
    return peak, psutil.virtual_memory().total * (1 - MALLOC_RESERVE) / config.train.workers, 1


def fastest_layout(config: Config, fits: Callable[[Config], bool]) -> Config | None:
    """Return the config with the first layout that fits, in the order of communication and computation.

    The stages in turn (1 and 2 communicate as much as 0, 3 half as much again), then with activation checkpointing,
    then with the optimizer states offloaded too.
    """
    for checkpointing, offload in ((False, "none"), (True, "none"), (True, "cpu")):
        for stage in range(4):
            layout = replace(
                config, zero__stage=stage, train__activation_checkpointing=checkpointing,
                zero__offload_optimizer=offload if stage else "none", zero__offload_param="none",
            )  # fmt: skip
            if fits(layout):
                return layout
    return None


def meta_model(config: Config) -> Any:
    """Return the model of a config without weights, with its trainable parameters marked. Raises UserError if there is none."""
    objective, model_config = objective_class(config.objective.name), make_model_config(config)
    with torch.device("meta"):
        model = model_from_config(model_config, objective.auto_class)
        return select_trainable(model, config.objective, config.seed, train_head=not objective.has_lm_head)


def make_model_config(config: Config) -> Any:
    """Return the model's config, of config.bundle (a folder or a run), else of `model.*`. Raises UserError if it is neither a folder nor a run."""
    if config.bundle:
        candidates = (Path(config.bundle), Path(config.runs_dir) / config.bundle / "bundle")
        folder = next((candidate for candidate in candidates if (candidate / "config.json").is_file()), None)
        if folder is None:
            raise UserError(
                f"bundle={config.bundle} is neither a model's folder nor a run with a bundle: a plan needs one of these"
            )
        return load_or_make_config(folder, config.model, None, {})
    inputs = InputSpec(
        vocab_size=config.model.vocab_size or config.data.vocab_size,
        image_size=config.data.image_size,
        max_source_positions=POSITIONS_PER_SECOND * config.data.audio_seconds if config.data.audio_column else None,
    )
    with quiet_transformers():  # about start tokens of a decoder, which only a tokenizer knows
        return make_config(config.model, inputs, {})


def plan_and_show(config: Config) -> None:
    """Compute the plan and print it; write it to the file of the option plan.json, if that is set."""
    result = plan(config)
    sizes = result.sizes
    frozen = f" ({sizes.parameters - sizes.trainable:,} of them frozen)" if sizes.trainable < sizes.parameters else ""
    workers = f"{config.train.workers} worker{'s' if config.train.workers > 1 else ''}"
    console.print(
        f"{sizes.parameters:,} parameters{frozen}, {result.flops_per_token / 1e6:,.1f} MFLOP/token, "
        f"{result.tokens_per_step:,} tokens/step, {result.precision}, {workers} with micro-batches of {config.micro_batch} samples"
    )
    console.print(memory_table(config, result))
    device = f"{format_bytes(result.device_bytes)} of {'this machine' if config.plan.device == 'here' else config.plan.device}"
    if result.layout is None or result.layout_memory is None:
        console.print(f"fits        no layout, in {device}: use more train.workers or a smaller train.micro_batch")
    else:
        console.print(
            f"fits        {layout_options(result.layout)}: {format_bytes(result.layout_memory.total)} in {device} (computed)"
        )
    source = "the measured matmul peak" if config.plan.device == "here" else f"the datasheet of {config.plan.device}"
    budget = f"{config.plan.tokens:,.0f} tokens" if config.plan.tokens else f"{config.train.max_steps:,} steps"
    console.print(
        f"step time   {format_duration(result.step_s)}, {budget} {format_duration(result.total_s)} (computed from {source}, "
        f"{result.peak_flops / 1e12:,.2f} TFLOP/s per device, at an assumed MFU of {100 * config.plan.mfu:.0f} %)"
    )
    if config.plan.price is not None:
        hours = result.total_s / 3600 * config.train.workers
        console.print(f"cost        {hours * config.plan.price:,.0f} for {hours:,.0f} device-hours (computed)")
    origin = "set" if config.plan.write_rate else "measured" if config.plan.device == "here" else "assumed"
    console.print(
        f"checkpoint  {format_bytes(result.checkpoint_bytes)} (computed: fp32 weights and optimizer states), "
        f"written in {format_duration(result.write_s)} in the background at {format_bytes(result.write_rate)}/s per worker ({origin})"
    )
    if config.plan.json:
        Path(config.plan.json).write_text(json.dumps(plan_figures(config, result), indent=1) + "\n")
        console.print(f"written     {config.plan.json}")


def memory_table(config: Config, result: Plan) -> Table:
    """Return a table of the memory at each stage by kind; host: offloaded to main memory."""
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "total", "host")
    unit, scale = ("GiB", 2**30) if result.stages["0"][1].total >= 2**30 else ("MiB", 2**20)
    title = f"memory of a worker by ZeRO stage, {unit}, at its peak (computed)"
    table = Table("", *kinds, "phase", title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name, (layout, need) in result.stages.items():
        mark = "*" if layout.zero == config.zero else " "
        table.add_row(f"{name}{mark}", *(f"{getattr(need, kind) / scale:,.2f}" for kind in kinds), need.phase)
    return table


def plan_figures(config: Config, result: Plan) -> dict[str, Any]:
    """Return the plan's figures as plain values, in bytes, seconds and FLOP/s."""
    return {
        "parameters": result.sizes.parameters,
        "trained": result.sizes.trainable,
        "flops_per_token": result.flops_per_token,
        "tokens_per_step": result.tokens_per_step,
        "precision": result.precision,
        "workers": config.train.workers,
        "micro_batch": config.micro_batch,
        "device": config.plan.device,
        "memory": {name: memory_figures(need) for name, (_, need) in result.stages.items()},
        "device_bytes": result.device_bytes,
        "fits": None if result.layout is None else layout_options(result.layout),
        "fits_bytes": None if result.layout_memory is None else result.layout_memory.total,
        "peak_flops": result.peak_flops,
        "mfu": config.plan.mfu,
        "step_s": result.step_s,
        "total_s": result.total_s,
        "checkpoint_bytes": result.checkpoint_bytes,
        "write_rate": result.write_rate,
        "write_s": result.write_s,
    }


def memory_figures(need: WorkerMemory) -> dict[str, Any]:
    """Return the memory of a worker by kind, in bytes, and the phase of a step (key "moment") in which it is needed."""
    kinds = asdict(need)
    return {"moment": kinds.pop("phase"), **kinds, "total": need.total}


def layout_options(layout: Config) -> str:
    """Return the options that select a layout, as on a command line."""
    options = [f"zero.stage={layout.zero.stage}"]
    if layout.train.activation_checkpointing:
        options.append("train.activation_checkpointing=true")
    if layout.zero.offload_optimizer != "none":
        options.append(f"zero.offload_optimizer={layout.zero.offload_optimizer}")
    return " ".join(options)


def format_bytes(count: float) -> str:
    """Format a number of bytes in the largest binary unit that it reaches."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} B"


def format_duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.3g} s"

"""The plan of a training job: memory, step time, size. Built on the meta device, so no weight is made."""

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
from engine.models.build import POSITIONS_A_SECOND, Inputs, config_of, from_config, shape_of, without_warnings
from engine.models.trained import choose_trained
from engine.objectives.contract import objective_class
from engine.plan.memory import FP32, MemoryPlan, Sizes, memory, on_processor
from engine.progress import console
from engine.train.devices import DEVICES, RESERVED
from engine.train.hardware import matmul_peak, precision

WRITE_RATE = 1e9  # bytes a second a worker: assumed, of one NVMe drive or a share of a parallel file system
KEPT = 0.2  # share of a processor's memory for freed blocks that malloc keeps: measured
RECOMPUTED = 4 / 3  # work of a step with activation checkpointing: the forward pass twice (Korthikanti et al. 2022)


@dataclass(frozen=True)
class Plan:
    """What a job needs. All of it is computed, but for `peak_flops` of plan.device=here, which is measured."""

    sizes: Sizes
    flops_per_token: float  # forward + backward
    tokens_per_step: int
    precision: str
    stages: dict[str, tuple[Config, MemoryPlan]]  # by name: a layout's config, and one worker's memory
    peak_flops: float  # FLOP/s of a matrix product on a worker's device
    device_bytes: float  # memory of a worker's device that a job can use
    layout: Config | None  # the config with the fastest layout that fits, None where none does
    step_s: float  # seconds, at plan.mfu of that peak
    total_s: float  # seconds of plan.tokens, or of train.max_steps
    checkpoint_bytes: int
    write_rate: float  # bytes a second that one worker writes
    write_s: float  # seconds until a checkpoint is written by all workers at once, beside the steps

    @property
    def fits(self) -> MemoryPlan | None:
        """The memory of a worker in that layout."""
        return None if self.layout is None else self.need(self.layout)

    def need(self, layout: Config) -> MemoryPlan:
        """Return the memory of a worker in a layout."""
        return memory(layout, self.sizes, layout.zero.stage, self.precision)


def plan(config: Config) -> Plan:
    """Compute the plan of a config. A model without model.vocab_size is given data.vocab_size.

    Raises UserError for an unknown architecture, or for a sequence that is longer than the model's positions.
    """
    shape = model_shape(config)
    task = objective_class(config.objective.name)
    positions = getattr(shape, "max_position_embeddings", None)
    if positions and config.data.sequence_length > positions:
        raise UserError(
            f"sequence length {config.data.sequence_length:,} is over the model's {positions:,} positions: "
            f"use data.sequence_length={positions}"
        )
    model = meta_model(config)
    sizes, kind = Sizes.of(model, config), precision(config.train) if config.plan.device == "here" else "bf16"
    peak, room, devices = device_of(config, kind)
    tokens = config.global_batch * sum(stack.tokens for stack in sizes.stacks)

    def taken(layout: Config) -> float:
        need = memory(layout, sizes, layout.zero.stage, kind)
        return need.total + (need.host if on_processor(config) else 0)

    layout = fastest_layout(config, lambda layout: taken(layout) <= room)
    again = RECOMPUTED if (layout or config).train.activation_checkpointing else 1.0
    flops = task(config.objective, None, config.data.sequence_length).flops(model) * config.global_batch / tokens
    step_s = tokens * flops * again / (config.plan.mfu * peak * devices)
    steps = config.plan.tokens / tokens if config.plan.tokens else config.train.max_steps
    checkpoint = FP32 * (sizes.parameters + sizes.moments + (sizes.trained if config.train.ema else 0))
    rate = write_rate(config)
    return Plan(
        sizes=sizes,
        flops_per_token=flops,
        tokens_per_step=tokens,
        precision=kind,
        stages={name: (c, memory(c, sizes, c.zero.stage, kind)) for name, c in layouts(config).items()},
        peak_flops=peak,
        device_bytes=room,
        layout=layout,
        step_s=step_s,
        total_s=step_s * steps,
        checkpoint_bytes=checkpoint,
        write_rate=rate,
        write_s=checkpoint / (rate * config.train.workers),
    )


def layouts(config: Config) -> dict[str, Config]:
    """Return the config at each ZeRO stage, and at each with what can be offloaded in main memory."""
    found = {}
    for stage in range(4):
        for offload in (False, True)[: 2 if stage else 1]:
            away = "cpu" if offload else "none"
            found[f"{stage} offload" if offload else str(stage)] = replace(
                config,
                zero__stage=stage,
                zero__offload_optimizer=away,
                zero__offload_param=away if stage == 3 else "none",
            )
    return found


def write_rate(config: Config) -> float:
    """Return the bytes a second that one worker writes: as asked, else assumed, or measured where the plan is for here."""
    if config.plan.write_rate:
        return config.plan.write_rate
    if config.plan.device != "here":
        return WRITE_RATE
    folder = next(folder for folder in (Path(config.runs_dir), Path()) if folder.is_dir())
    block = bytes(2**24)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(4):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 4 * len(block) / (time.perf_counter() - began) / config.train.workers


def device_of(config: Config, kind: str) -> tuple[float, float, int]:
    """Return a device's FLOP/s and usable bytes, and how many devices the workers are."""
    if config.plan.device != "here":
        device = DEVICES[config.plan.device]
        return device.flops, device.bytes * (1 - RESERVED), config.train.workers
    cuda = torch.cuda.is_available()
    peak = matmul_peak(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if kind == "bf16" else torch.float32)
    if cuda:
        return peak, torch.cuda.get_device_properties(0).total_memory * (1 - RESERVED), config.train.workers
    # The workers share the cores and the memory.
    return peak, psutil.virtual_memory().total * (1 - KEPT) / config.train.workers, 1


def fastest_layout(config: Config, fits: Callable[[Config], bool]) -> Config | None:
    """Return the config with the first layout that fits, those with less traffic and less work first.

    The stages in turn (1 and 2 send what 0 sends, 3 sends half as much again), then with activations computed again,
    then with the optimizer in main memory.
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
    """Return the model of a config without any weights, those marked that are trained. Raises UserError if there is none."""
    task, shape = objective_class(config.objective.name), model_shape(config)
    with torch.device("meta"):
        model = from_config(shape, task.auto_class)
        return choose_trained(model, config.objective, config.seed, head=not task.over_vocabulary)


def model_shape(config: Config) -> Any:
    """Return the model's config, of config.bundle (a folder or a run), else of `model.*`. Raises UserError if it is neither."""
    if config.bundle:
        places = (Path(config.bundle), Path(config.runs_dir) / config.bundle / "bundle")
        folder = next((place for place in places if (place / "config.json").is_file()), None)
        if folder is None:
            raise UserError(
                f"bundle={config.bundle} is neither a model's folder nor a run with a bundle: a plan needs one of these"
            )
        return shape_of(folder, config.model, None, {})
    inputs = Inputs(
        vocab_size=config.model.vocab_size or config.data.vocab_size,
        image_size=config.data.image_size,
        max_source_positions=POSITIONS_A_SECOND * config.data.audio_seconds if config.data.audio_column else None,
    )
    with without_warnings():  # of the tokens that a decoder begins with, which only a tokenizer knows
        return config_of(config.model, inputs, {})


def plan_and_show(config: Config) -> None:
    """Compute the plan and print it; write it to the file plan.json too, if that is asked for."""
    found = plan(config)
    sizes = found.sizes
    frozen = f" ({sizes.parameters - sizes.trained:,} of them frozen)" if sizes.trained < sizes.parameters else ""
    workers = f"{config.train.workers} worker{'s' if config.train.workers > 1 else ''}"
    console.print(
        f"{sizes.parameters:,} parameters{frozen}, {found.flops_per_token / 1e6:,.1f} MFLOP a token, "
        f"{found.tokens_per_step:,} tokens a step, {found.precision}, {workers} of {config.micro_batch} samples a forward"
    )
    console.print(memory_table(config, found))
    room = f"{size(found.device_bytes)} of {'this machine' if config.plan.device == 'here' else config.plan.device}"
    if found.layout is None or found.fits is None:
        console.print(f"fits        no layout, in {room}: use more train.workers or a smaller train.micro_batch")
    else:
        console.print(f"fits        {describe(found.layout)}: {size(found.fits.total)} in {room} (computed)")
    source = "the measured matmul peak" if config.plan.device == "here" else f"the datasheet of {config.plan.device}"
    budget = f"{config.plan.tokens:,.0f} tokens" if config.plan.tokens else f"{config.train.max_steps:,} steps"
    console.print(
        f"step time   {duration(found.step_s)}, {budget} {duration(found.total_s)} (computed from {source}, "
        f"{found.peak_flops / 1e12:,.2f} TFLOP/s a device, at an assumed MFU of {100 * config.plan.mfu:.0f} %)"
    )
    if config.plan.price is not None:
        hours = found.total_s / 3600 * config.train.workers
        console.print(f"cost        {hours * config.plan.price:,.0f} for {hours:,.0f} device-hours (computed)")
    told = "as asked" if config.plan.write_rate else "measured" if config.plan.device == "here" else "assumed"
    console.print(
        f"checkpoint  {size(found.checkpoint_bytes)} (computed: fp32 weights and the optimizer's state), "
        f"written in {duration(found.write_s)} beside the steps at {size(found.write_rate)}/s a worker ({told})"
    )
    if config.plan.json:
        Path(config.plan.json).write_text(json.dumps(facts(config, found), indent=1) + "\n")
        console.print(f"written     {config.plan.json}")


def memory_table(config: Config, found: Plan) -> Table:
    """Return the memory of each stage by kind, with what is kept in main memory beside it."""
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "total", "host")
    unit, scale = ("GiB", 2**30) if found.stages["0"][1].total >= 2**30 else ("MiB", 2**20)
    title = f"memory of a worker by ZeRO stage, {unit}, when it is highest (computed)"
    table = Table("", *kinds, "in", title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name, (layout, need) in found.stages.items():
        mark = "*" if layout.zero == config.zero else " "
        table.add_row(f"{name}{mark}", *(f"{getattr(need, kind) / scale:,.2f}" for kind in kinds), need.moment)
    return table


def facts(config: Config, found: Plan) -> dict[str, Any]:
    """Return the plan's figures as plain values, in bytes, seconds and FLOP/s."""
    return {
        "parameters": found.sizes.parameters,
        "trained": found.sizes.trained,
        "flops_per_token": found.flops_per_token,
        "tokens_per_step": found.tokens_per_step,
        "precision": found.precision,
        "workers": config.train.workers,
        "micro_batch": config.micro_batch,
        "device": config.plan.device,
        "memory": {name: {**asdict(need), "total": need.total} for name, (_, need) in found.stages.items()},
        "device_bytes": found.device_bytes,
        "fits": None if found.layout is None else describe(found.layout),
        "fits_bytes": None if found.fits is None else found.fits.total,
        "peak_flops": found.peak_flops,
        "mfu": config.plan.mfu,
        "step_s": found.step_s,
        "total_s": found.total_s,
        "checkpoint_bytes": found.checkpoint_bytes,
        "write_rate": found.write_rate,
        "write_s": found.write_s,
    }


def describe(layout: Config) -> str:
    """Name a layout by the options that give it."""
    words = [f"zero.stage={layout.zero.stage}"]
    if layout.train.activation_checkpointing:
        words.append("train.activation_checkpointing=true")
    if layout.zero.offload_optimizer != "none":
        words.append(f"zero.offload_optimizer={layout.zero.offload_optimizer}")
    return " ".join(words)


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

"""Tokens per second of the engine's training step against a bare DeepSpeed loop and hand-written PyTorch loops, eager and compiled.

One process, all cores, the same model (llama_5m), data, batch (16 x 256 tokens), precision, fused AdamW, gradient clipping. Then
the MFU of a model of 30 M parameters, compiled, in bf16, relative to the measured rate of matrix products.
Predicted: 1.4 times DeepSpeed and PyTorch in bf16 (attention is two fifths of their step and takes us half the time; our loss
uses a third of the memory and stays in the cache; data order, hash, timer and finite check cost under a millisecond of some
400), 1.1 times in fp32, 1.4 times the compiled loop, an MFU of 60 %.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cluster.environment import set_default_environment
from engine.config import Config, with_values
from engine.data.order import DataOrder
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.models.size import flops_per_token, parameter_count
from engine.train import hardware
from engine.train.checkpoint import CheckpointWriter
from engine.train.init_model import apply_optimizations, make_model
from engine.train.job import TrainJob
from engine.train.loop import TrainingRun, train_step
from engine.train.optimizer import parameter_groups
from engine.train.sequence_parallel import SequenceParallel
from engine.train.worker import make_meter, single_process_group
from engine.train.zero import DTYPES, ZeroModel, deepspeed_config
from jobs.entry import compose
from tests.bench.interleaved import interleave, show

STEPS = 6  # per measurement


def steps_rate(step: Callable[[], Any], tokens: int) -> float:
    """Return tokens per second over STEPS steps."""
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * tokens / (time.perf_counter() - began)


def batches(job: TrainJob, order: DataOrder) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that returns the next (inputs, targets): the same samples in the same order for each contestant."""
    samples, step_numbers = job.objective().samples(Split.open(job.data_folder, "train")), iter(range(10**9))

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack([torch.as_tensor(samples[i]["tokens"]) for i in order.sample_ids(next(step_numbers))])
        return rows[:, :-1], rows[:, 1:].contiguous()

    return next_batch


def engine_step(job: TrainJob, order: DataOrder, precision: str) -> Callable[[], Any]:
    """Return the engine's training step."""
    objective, group = job.objective(), single_process_group()
    model = make_model(job, objective)
    flops = flops_per_token(model, model.config, job.config.data.sequence_length)
    apply_optimizations(model, job.config.train, group.device, precision)
    sharded = ZeroModel(model, job.config, 1, precision)
    sharded.init_optimizer_state(0)
    folder = Path(job.config.runs_dir)
    run = TrainingRun(
        config=job.config, group=group, objective=objective, model=sharded,
        samples=objective.samples(Split.open(job.data_folder, "train")), validation=None, order=order,
        writer=CheckpointWriter(folder, 0, 1, 1), checkpoint_info={}, log=print, sequence=SequenceParallel(group),
        meter=make_meter(group, DTYPES[precision], flops),
    )  # fmt: skip
    sharded.train()
    return lambda: train_step(run) | run.meter.end_step()


def mean_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def deepspeed_step(job: TrainJob, order: DataOrder, precision: str) -> Callable[[], Any]:
    """Return the step of a bare DeepSpeed loop."""
    import deepspeed

    single_process_group()
    model, next_batch = make_model(job, job.objective()), batches(job, order)
    optimizer = torch.optim.AdamW(parameter_groups(model, job.config.optim), lr=1e-3, betas=(0.9, 0.95), fused=True)
    options = deepspeed_config(job.config, precision, sum(p.numel() for p in model.parameters()))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=options | {"managed_gradient_accumulation": True},
        dist_init_required=False,
    )

    def step() -> None:
        inputs, targets = next_batch()
        loss = mean_cross_entropy(engine(input_ids=inputs, use_cache=False).logits, targets)
        engine.backward(loss)
        engine.step()
        loss.item()

    return step


def pytorch_step(job: TrainJob, order: DataOrder, precision: str, compiled: bool = False) -> Callable[[], Any]:
    """Return the step of a hand-written loop; in bf16 with fp32 master weights, as the others have."""
    model, next_batch = make_model(job, job.objective()), batches(job, order)
    if precision == "fp32":
        optimizer = torch.optim.AdamW(parameter_groups(model, job.config.optim), lr=1e-3, betas=(0.9, 0.95), fused=True)
        masters = list(model.parameters())
    else:
        masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        groups = [
            {"params": [m for m in masters if m.ndim >= 2], "weight_decay": 0.1},
            {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        model = model.to(torch.bfloat16)
    if compiled:
        model.compile()

    def step() -> None:
        inputs, targets = next_batch()
        loss = mean_cross_entropy(model(input_ids=inputs, use_cache=False).logits, targets)
        loss.backward()
        if precision == "bf16":
            for master, p in zip(masters, model.parameters(), strict=True):
                master.grad = p.grad.float()
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        if precision == "bf16":
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)
        model.zero_grad()
        optimizer.zero_grad()
        loss.item()

    return step


def compiled_engine_step(job: TrainJob, order: DataOrder, precision: str) -> Callable[[], Any]:
    """Return the engine's training step with train.compile=true."""
    return engine_step(replace(job, config=with_values(job.config, {"train.compile": True})), order, precision)


def compiled_pytorch_step(job: TrainJob, order: DataOrder, precision: str) -> Callable[[], Any]:
    """Return the step of a hand-written loop with torch.compile."""
    return pytorch_step(job, order, precision, compiled=True)


EAGER = {"engine": engine_step, "bare DeepSpeed": deepspeed_step, "hand-written PyTorch": pytorch_step}
COMPILED = {"engine, compiled": compiled_engine_step, "PyTorch, compiled": compiled_pytorch_step}
THIRTY_MILLION = {
    "model.hidden_size": 512, "model.num_hidden_layers": 8, "model.intermediate_size": 1408, "data.sequence_length": 512,
    "train.global_batch": 8, "train.micro_batch": 8,
}  # fmt: skip


def measure(
    job: TrainJob, precision: str, makers: dict[str, Callable[..., Callable[[], Any]]]
) -> dict[str, list[float]]:
    """Return tokens per second of each contestant in each turn."""
    batch = job.config.global_batch
    order = DataOrder(len(job.objective().samples(Split.open(job.data_folder, "train"))), batch, 0)
    steps = {name: make(job, order, precision) for name, make in makers.items()}
    tokens = batch * job.config.data.sequence_length
    return interleave({name: (lambda step=step: steps_rate(step, tokens)) for name, step in steps.items()})


def show_mfu(job: TrainJob) -> None:
    """Print the MFU of a model of 30 M parameters, ours and a compiled PyTorch loop's, relative to products of 4096 x 4096 matrices."""
    objective = job.objective()
    model = make_model(job, objective)
    flops = flops_per_token(model, model.config, job.config.data.sequence_length)
    print(f"\n{parameter_count(model) / 1e6:.1f} M parameters, bf16, compiled, {flops / 1e6:.0f} MFLOP per token")
    peak = hardware.matmul_peak(torch.device("cpu"), torch.bfloat16, 4096)
    rates_by_name = measure(job, "bf16", COMPILED)
    peak = max(peak, hardware.matmul_peak(torch.device("cpu"), torch.bfloat16, 4096))
    for name, rates in rates_by_name.items():
        print(f"{name:<28} MFU {statistics.median(rates) * flops / peak:.1%} of {peak / 1e9:,.0f} GFLOP/s, target 50 %")


def main() -> None:
    """Print the ratios for each precision."""
    set_default_environment()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        config: Config = with_values(
            compose("pretrain", []),
            {"runs_dir": folder, "train.global_batch": 16, "train.micro_batch": 16, "zero.stage": 1},
        )
        data = prepare(config)
        for precision in ("bf16", "fp32") if hardware.has_bf16() else ("fp32",):
            job = TrainJob(with_values(config, {"train.precision": precision}), data)
            print(f"\n{precision}, ZeRO 1, {torch.get_num_threads()} threads")
            rates = measure(job, precision, EAGER)
            show(rates, "tokens/s", "engine", {"bare DeepSpeed": 1.0, "hand-written PyTorch": 1.0}, precision)
        if hardware.has_bf16():
            job = TrainJob(with_values(config, {"train.precision": "bf16"}), data)
            show(
                measure(job, "bf16", COMPILED),
                "tokens/s",
                "engine, compiled",
                {"PyTorch, compiled": 1.0},
                "bf16, compiled",
            )
            show_mfu(TrainJob(with_values(config, THIRTY_MILLION | {"train.precision": "bf16"}), data))


if __name__ == "__main__":
    main()

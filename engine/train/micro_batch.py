"""Finds the largest micro-batch that fits in memory with a dry batch, and caches it per machine, model and layout."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.atomic_write import write_atomically
from engine.config import Config, select
from engine.train import hardware
from engine.train.loop import TrainingRun
from engine.train.process_group import ProcessGroup

CACHE_FILE = "micro_batches.json"  # in runs_dir
MAX_ON_CPU = 16  # samples: a larger micro-batch is no faster on a CPU
MEMORY_FRACTION = (
    0.85  # of the free memory to use; the rest is for fragmentation and for batches larger than the dry one
)


def find_micro_batch(run: TrainingRun) -> int:
    """Return the micro-batch that fits on every rank, at most a rank's share of the global batch; the same on all ranks."""
    config, group = run.config, run.group
    limit = config.samples_per_worker if group.device.type == "cuda" else min(config.samples_per_worker, MAX_ON_CPU)
    if limit == 1:
        return 1
    facts = memory_facts(config, group)
    file = Path(config.runs_dir) / CACHE_FILE
    micro_batch = read_cached(file, facts) if group.rank == 0 else 0
    (micro_batch,) = group.all_reduce_ints(micro_batch)
    if micro_batch == 0:
        micro_batch = measure_micro_batch(run)
        if group.rank == 0:
            write_cached(file, facts, micro_batch)
    return min(micro_batch, limit)


def measure_micro_batch(run: TrainingRun) -> int:
    """Return how many samples fit, by the peak memory of dry batches of one and of three samples."""
    device = run.group.device
    budget_bytes = MEMORY_FRACTION * hardware.free_memory_bytes(device)
    peaks = []
    for samples in (1, 3):
        hardware.reset_peak_memory(device)
        used_bytes = hardware.used_memory_bytes(device)
        run_dry_batch(run, samples)
        peaks.append(hardware.peak_memory_bytes(device) - used_bytes)
    hardware.reset_peak_memory(device)
    fitting = max_samples(peaks[0], peaks[1], budget_bytes)
    gathered = run.group.all_gather_arrays({"fitting": np.array([fitting])})
    return int(min(arrays["fitting"][0] for arrays in gathered))


def max_samples(one_bytes: int, three_bytes: int, budget_bytes: float) -> int:
    """Return how many samples fit in the budget, given the memory of one and of three; it grows linearly with samples."""
    per_sample = max(1.0, (three_bytes - one_bytes) / 2)
    return max(1, int(1 + min(2**20, (budget_bytes - one_bytes) / per_sample)))


def run_dry_batch(run: TrainingRun, samples: int) -> None:
    """Run a forward and a backward pass whose gradients are all zero, leaving weights and random state unchanged."""
    longest = max(range(min(64, len(run.samples))), key=lambda i: num_elements(run.samples[i]))
    batch = run.collate([run.samples[longest] | {"draw": 0}] * samples)
    devices = [run.group.device] if run.group.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        ((batch, _),) = run.objective.before_step(run.model, [(batch, 1.0)], run.group)  # type: ignore[arg-type]
        loss = run.objective.loss(run.model, batch)  # type: ignore[arg-type]
        run.model.backward(loss.sum * 0.0)


def num_elements(sample: dict[str, Any]) -> int:
    """Return the number of elements in a sample's arrays."""
    return sum(int(np.size(value)) for value in sample.values())


def memory_facts(config: Config, group: ProcessGroup) -> dict[str, Any]:
    """Return everything that memory use depends on: the machine, the model, the objective and the layout."""
    on_gpu = group.device.type == "cuda"
    machine = torch.cuda.get_device_name(group.device) if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"machine": machine, "memory_gib": round(hardware.total_memory_bytes(group.device) / 2**30),
            "workers": group.world_size, **select(config, "micro_batch")}  # fmt: skip


def read_cached(file: Path, facts: dict[str, Any]) -> int:
    """Return the cached micro-batch for these facts; 0 if there is none."""
    try:
        return int(json.loads(file.read_text())[_key(facts)]["micro_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # never measured, or the file is damaged: it is measured again


def write_cached(file: Path, facts: dict[str, Any], micro_batch: int) -> None:
    """Add a measured micro-batch to the file."""
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError):
        entries = {}
    entries[_key(facts)] = {"micro_batch": micro_batch, "machine": facts["machine"], "model": facts["model.type"]}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")  # several runs may write the file at once
    write_atomically(file, json.dumps(entries, indent=1), temporary=temporary)


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

"""The micro-batch that fits: tried once with a dry batch, then remembered for this kind of machine, model and layout."""

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
from engine.config import Config, identity
from engine.train import hardware
from engine.train.process_group import Group
from engine.train.loop import Run

REMEMBERED = "micro_batches.json"  # in runs_dir
MOST_ON_A_PROCESSOR = 16  # samples: more at a time made no step of a processor faster, and its caches are small
MARGIN = 0.85  # share of the free memory to be used: fragments, and batches that are larger than the dry one


def fitting_micro_batch(run: Run) -> int:
    """Return how many samples at a time fit on every rank, at most a rank's share of a step; all ranks get the same."""
    config, group = run.config, run.group
    most = config.share if group.device.type == "cuda" else min(config.share, MOST_ON_A_PROCESSOR)
    if most == 1:
        return 1
    facts = deciding(config, group)
    file = Path(config.runs_dir) / REMEMBERED
    known = recall(file, facts) if group.rank == 0 else 0
    (known,) = group.sum_integers(known)
    if known == 0:
        known = try_out(run)
        if group.rank == 0:
            remember(file, facts, known)
    return min(known, most)


def try_out(run: Run) -> int:
    """Return how many samples fit, by the memory that a dry batch of one and another of three samples take."""
    device = run.group.device
    room = MARGIN * hardware.free_memory_bytes(device)
    peaks = []
    for samples in (1, 3):
        hardware.reset_peak_memory(device)
        before = hardware.held_memory_bytes(device)
        dry_batch(run, samples)
        peaks.append(hardware.peak_memory_bytes(device) - before)
    hardware.reset_peak_memory(device)
    found = most_that_fit(peaks[0], peaks[1], room)
    return int(min(part["found"][0] for part in run.group.gather({"found": np.array([found])})))


def most_that_fit(one: int, three: int, room: float) -> int:
    """Return how many samples fit in `room` bytes if one takes `one` and three take `three`: memory grows by the sample."""
    each = max(1.0, (three - one) / 2)
    return max(1, int(1 + min(2**20, (room - one) / each)))


def dry_batch(run: Run, samples: int) -> None:
    """Take a forward and a backward pass whose gradients are all zero, and leave everything as it was."""
    longest = max(range(min(64, len(run.samples))), key=lambda i: size_of(run.samples[i]))
    batch = run.collate([run.samples[longest] | {"draw": 0}] * samples)
    devices = [run.group.device] if run.group.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        ((batch, _),) = run.objective.before_step(run.model, [(batch, 1.0)], run.group)  # type: ignore[arg-type]
        loss = run.objective.loss(run.model, batch)  # type: ignore[arg-type]
        run.model.backward(loss.sum * 0.0)


def size_of(sample: dict[str, Any]) -> int:
    """Count the elements of a sample's arrays."""
    return sum(int(np.size(value)) for value in sample.values())


def deciding(config: Config, group: Group) -> dict[str, Any]:
    """Return all that decides how much fits: the machine, the model, the task and the layout."""
    on_gpu = group.device.type == "cuda"
    chosen = {
        key: value
        for key, value in identity(config, ignoring=()).items()
        if key.startswith(("model.", "objective.", "zero.")) or key in (
            "data.sequence_length", "data.vocab_size", "data.tokenizer", "bundle", "optim.name", "train.ema",
            "train.precision", "train.compile", "train.sequence_parallel", "train.activation_checkpointing",
        )
    }  # fmt: skip
    machine = torch.cuda.get_device_name(group.device) if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"machine": machine, "memory_gib": round(hardware.total_memory_bytes(group.device) / 2**30),
            "workers": group.world, **chosen}  # fmt: skip


def recall(file: Path, facts: dict[str, Any]) -> int:
    """Return what is remembered for these facts, 0 for nothing."""
    try:
        return int(json.loads(file.read_text())[_key(facts)]["micro_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # never tried, or the file was lost: it is tried again


def remember(file: Path, facts: dict[str, Any], micro_batch: int) -> None:
    """Add what was found to the file."""
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError):
        entries = {}
    entries[_key(facts)] = {"micro_batch": micro_batch, "machine": facts["machine"], "model": facts["model.type"]}
    own = file.with_name(f".{file.name}.{os.getpid()}.part")  # several runs may write the file at once
    write_atomically(file, json.dumps(entries, indent=1), temporary=own)


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

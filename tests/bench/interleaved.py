"""Paired measurements: the contestants take turns, and ratios are formed turn by turn, so that a drifting machine cancels out."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

RESULTS = Path("runs/bench.jsonl")  # gets a line for each ratio


def interleave(contestants: dict[str, Callable[[], float]], repeats: int = 5) -> dict[str, list[float]]:
    """Measure each contestant `repeats` times, in turn, after one round that does not count."""
    for measure in contestants.values():
        measure()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, measure in contestants.items():
            found[name].append(measure())
    return found


def show(found: dict[str, list[float]], unit: str, ours: str, targets: dict[str, float], setting: str = "") -> None:
    """Print each contestant's median and spread, and our ratio to each peer with its target; add the ratios to RESULTS."""
    for name, values in found.items():
        print(f"{name:<28} {statistics.median(values):12,.1f} {unit}  ({min(values):,.1f} to {max(values):,.1f})")
    for peer, target in targets.items():
        ratios = [a / b for a, b in zip(found[ours], found[peer], strict=True)]
        print(
            f"{ours} / {peer}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)}), target {target}"
        )
        record(
            setting=setting, ours=ours, against=peer, unit=unit, ratio=statistics.median(ratios), least=min(ratios),
            most=max(ratios), repeats=len(ratios), target=target, values={name: found[name] for name in (ours, peer)},
        )  # fmt: skip


def record(**result: object) -> None:
    """Add a result to RESULTS, with the bench's name, the machine and the time."""
    spec = sys.modules["__main__"].__spec__
    about = {
        "bench": spec.name.rpartition(".")[2] if spec else Path(sys.argv[0]).stem,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(about | result) + "\n")


def machine() -> str:
    """Name the processor, its cores and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"

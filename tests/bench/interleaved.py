"""Paired measurements: the contestants are measured in turn and ratios are computed per turn, so that drift of the machine cancels."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

RESULTS = Path("runs/bench.jsonl")  # one line per ratio


def interleave(contestants: dict[str, Callable[[], float]], repeats: int = 5) -> dict[str, list[float]]:
    """Measure each contestant `repeats` times, in turn, after a warm-up round."""
    for measure in contestants.values():
        measure()
    measurements: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, measure in contestants.items():
            measurements[name].append(measure())
    return measurements


def show(
    measurements: dict[str, list[float]], unit: str, ours: str, targets: dict[str, float], setting: str = ""
) -> None:
    """Print each contestant's median and range, and our ratio to each peer with its target; append the ratios to RESULTS."""
    for name, values in measurements.items():
        print(f"{name:<28} {statistics.median(values):12,.1f} {unit}  ({min(values):,.1f} to {max(values):,.1f})")
    for peer, target in targets.items():
        ratios = [a / b for a, b in zip(measurements[ours], measurements[peer], strict=True)]
        print(
            f"{ours} / {peer}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)}), target {target}"
        )
        record(
            setting=setting, ours=ours, against=peer, unit=unit, ratio=statistics.median(ratios), least=min(ratios),
            most=max(ratios), repeats=len(ratios), target=target, values={name: measurements[name] for name in (ours, peer)},
        )  # fmt: skip


def record(**result: object) -> None:
    """Append a result to RESULTS, with the benchmark's name, the machine and the time."""
    spec = sys.modules["__main__"].__spec__
    context = {
        "bench": spec.name.rpartition(".")[2] if spec else Path(sys.argv[0]).stem,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(context | result) + "\n")


def machine() -> str:
    """Describe the processor, its cores and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"

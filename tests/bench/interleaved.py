"""Paired measurements: the contestants take turns, and ratios are formed turn by turn, so that a drifting machine cancels out."""

from __future__ import annotations

import statistics
from collections.abc import Callable


def interleave(contestants: dict[str, Callable[[], float]], repeats: int = 5) -> dict[str, list[float]]:
    """Measure each contestant `repeats` times, in turn, after one round that does not count."""
    for measure in contestants.values():
        measure()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, measure in contestants.items():
            found[name].append(measure())
    return found


def show(found: dict[str, list[float]], unit: str, ours: str, targets: dict[str, float]) -> None:
    """Print each contestant's median and spread, and our ratio to each peer with its target."""
    for name, values in found.items():
        print(f"{name:<28} {statistics.median(values):12,.1f} {unit}  ({min(values):,.1f} to {max(values):,.1f})")
    for peer, target in targets.items():
        ratios = [a / b for a, b in zip(found[ours], found[peer], strict=True)]
        print(
            f"{ours} / {peer}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)}), target {target}"
        )

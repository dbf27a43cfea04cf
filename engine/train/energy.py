"""Energy used by training: read from hardware counters where there are any, else estimated and marked as an estimate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 12.0  # default for a CPU of unknown model: Lannelongue et al. 2021 (Green Algorithms), table S1
METHODS = {
    "measured_j": "the counters of the first worker's machine: CPU packages by RAPL, GPUs by NVML, those times the workers",
    "estimated_j": f"{WATTS_PER_CORE:g} W for each core at work, as Green Algorithms does (Lannelongue et al. 2021)",
}


class EnergyCounter:
    """A counter of joules that wraps to zero at `range_j`."""

    def __init__(self, read: Callable[[], float], range_j: float = float("inf")) -> None:
        """`read` returns the count in joules."""
        self._read, self._range_j, self._last = read, range_j, read()

    def lap(self) -> float:
        """Return the joules since the last call."""
        now = self._read()
        used = now - self._last if now >= self._last else now + self._range_j - self._last
        self._last = now
        return used


class EnergyMeter:
    """Measures the joules between two laps, on rank 0."""

    def __init__(self, device: torch.device, world_size: int, powercap: Path = POWERCAP) -> None:
        """Find the counters: NVML's where the device is a GPU (times `world_size`, one GPU per rank), RAPL's of the machine's CPUs."""
        gpu = device.type == "cuda"
        self._gpus = gpu_counters(device) if gpu else []
        self._cpus = rapl_counters(powercap)
        self._world_size = world_size
        self._watts = 0.0 if gpu or self._cpus else WATTS_PER_CORE * torch.get_num_threads() * world_size
        self._last_lap = time.monotonic()

    def lap(self) -> dict[str, float]:
        """Return {"energy_measured_j"} or {"energy_estimated_j"} since the last lap; empty if neither is available."""
        now = time.monotonic()
        seconds, self._last_lap = now - self._last_lap, now
        if self._gpus or self._cpus:
            gpus = self._world_size * sum(counter.lap() for counter in self._gpus)
            return {"energy_measured_j": gpus + sum(counter.lap() for counter in self._cpus)}
        return {"energy_estimated_j": self._watts * seconds} if self._watts else {}


def rapl_counters(powercap: Path) -> list[EnergyCounter]:
    """Return a counter for each CPU package with a readable energy counter (powercap; on most systems root only)."""
    counters = []
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") > 1:  # a zone within a package, which is counted already
            continue
        try:
            range_j = int((folder / "max_energy_range_uj").read_text()) / 1e6
            counters.append(EnergyCounter(lambda file=folder / "energy_uj": int(file.read_text()) / 1e6, range_j))  # type: ignore[misc]
        except (OSError, ValueError):
            continue
    return counters


def gpu_counters(device: torch.device) -> list[EnergyCounter]:
    """Return the counter of this process's GPU (NVML, Volta or later); none without nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return [EnergyCounter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]
    except Exception:  # NVML raises many error classes, and a missing energy figure must not end a run
        return []


def total_energy(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum the energy over a run's lines of metrics.jsonl, all restarts included."""
    sums = {"measured_j": 0.0, "estimated_j": 0.0}
    for line in lines:
        for kind in sums:
            sums[kind] += line.get(f"energy_{kind}", 0.0)
    return {**sums, "how": {kind: METHODS[kind] for kind, joules in sums.items() if joules}}

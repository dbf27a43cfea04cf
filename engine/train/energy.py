"""Energy that training takes: read from the hardware's counters where there are any, else estimated and marked so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
WATTS_A_CORE = 12.0  # of a CPU whose model is not looked up: Lannelongue et al. 2021 (Green Algorithms), table S1
HOW = {
    "measured_j": "the counters of the first worker's machine: CPU packages by RAPL, GPUs by NVML, those times the workers",
    "estimated_j": f"{WATTS_A_CORE:g} W for each core at work, as Green Algorithms does (Lannelongue et al. 2021)",
}


class Counter:
    """A counter of joules that starts again at zero when it has come to `range_j`."""

    def __init__(self, read: Callable[[], float], range_j: float = float("inf")) -> None:
        """`read` gives the count in joules."""
        self._read, self._range_j, self._last = read, range_j, read()

    def lap(self) -> float:
        """Return the joules since the last call."""
        now = self._read()
        used = now - self._last if now >= self._last else now + self._range_j - self._last
        self._last = now
        return used


class EnergyMeter:
    """Tells the joules between two laps, as rank 0 sees them."""

    def __init__(self, device: torch.device, world: int, powercap: Path = POWERCAP) -> None:
        """Find the counters: NVML's where the device is a GPU (times `world`, a GPU each), RAPL's of the machine's CPUs."""
        gpu = device.type == "cuda"
        self._gpus = gpu_counters(device) if gpu else []
        self._cpus = rapl_counters(powercap)
        self._world = world
        self._watts = 0.0 if gpu or self._cpus else WATTS_A_CORE * torch.get_num_threads() * world
        self._then = time.monotonic()

    def lap(self) -> dict[str, float]:
        """Return {"energy_measured_j"} or {"energy_estimated_j"} since the last lap; nothing where neither can be told."""
        now = time.monotonic()
        seconds, self._then = now - self._then, now
        if self._gpus or self._cpus:
            gpus = self._world * sum(counter.lap() for counter in self._gpus)
            return {"energy_measured_j": gpus + sum(counter.lap() for counter in self._cpus)}
        return {"energy_estimated_j": self._watts * seconds} if self._watts else {}


def rapl_counters(powercap: Path) -> list[Counter]:
    """Return a counter for each CPU package whose energy may be read (the kernel's powercap interface; root alone, mostly)."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") > 1:  # a part of a package, which counts already
            continue
        try:
            top = int((folder / "max_energy_range_uj").read_text()) / 1e6
            found.append(Counter(lambda file=folder / "energy_uj": int(file.read_text()) / 1e6, top))  # type: ignore[misc]
        except (OSError, ValueError):
            continue
    return found


def gpu_counters(device: torch.device) -> list[Counter]:
    """Return the counter of this process's GPU (NVML has it from Volta on); none without nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return [Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]
    except (
        Exception
    ):  # NVML has an error class for each thing that may lack, and a run must not end for want of a figure
        return []


def total(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add up the energy in a run's lines of metrics, over all its restarts."""
    sums = {"measured_j": 0.0, "estimated_j": 0.0}
    for line in lines:
        for kind in sums:
            sums[kind] += line.get(f"energy_{kind}", 0.0)
    return {**sums, "how": {kind: HOW[kind] for kind, joules in sums.items() if joules}}

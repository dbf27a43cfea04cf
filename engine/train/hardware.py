"""What the processor at hand can do."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

import psutil
import torch

from engine.config import TrainConfig
from engine.train.devices import known_device


def precision(train: TrainConfig) -> str:
    """Return fp32 or bf16: what was asked for, else bf16 where the hardware multiplies it."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if has_bf16() else "fp32"


def has_bf16() -> bool:
    """Tell whether GPU or CPU (AMX, AVX512-BF16) multiplies bf16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measure the rate of a large square matrix product, in FLOP/s: the best of some tries. Costs about 0.1 s."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
        del product
    return best


def datasheet_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the datasheet's 16-bit rate of a GPU in FLOP/s; None for another kind of device or number."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    found = torch.cuda.get_device_properties(device)
    known = known_device(found.name, found.total_memory)
    return known.flops if known else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held since the last reset: the GPU's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak begin at what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not on every kernel: then the peak is that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")


def held_memory_bytes(device: torch.device) -> int:
    """Return the memory held now: the GPU's allocator, or the process's resident set."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def total_memory_bytes(device: torch.device) -> int:
    """Return the device's memory: the GPU's, or this process's share of it, or the machine's (or its container's)."""
    if device.type == "cuda":
        share = torch.cuda.get_per_process_memory_fraction(device)
        return int(torch.cuda.get_device_properties(device).total_memory * share)
    return min(psutil.virtual_memory().total, _container_limit("memory.max") or 2**63)


def free_memory_bytes(device: torch.device) -> float:
    """Return the memory that this rank may still take: of the GPU, or its part of what is free on its machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return min(free + reserved, total_memory_bytes(device)) - held
    free = psutil.virtual_memory().available
    if limit := _container_limit("memory.max"):
        free = min(free, limit - _container_limit("memory.current"))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _container_limit(name: str) -> int:
    """Return a figure of the control group in bytes, 0 where there is none."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return 0

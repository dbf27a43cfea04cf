"""Properties of this machine's CPU or GPU: supported precision, matrix-product rate, memory."""

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
    """Return train.precision; for "auto", bf16 if the hardware supports it, else fp32."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if has_bf16() else "fp32"


def has_bf16() -> bool:
    """Return whether the GPU or CPU (AMX, AVX512-BF16) multiplies bf16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measure the rate of a large square matrix product, in FLOP/s: the best of 8 tries. Takes about 0.1 s."""
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
    """Return the datasheet's 16-bit rate of a GPU in FLOP/s; None for other devices and for fp32."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    properties = torch.cuda.get_device_properties(device)
    known = known_device(properties.name, properties.total_memory)
    return known.flops if known else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the last reset: of the GPU's allocator, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak to the memory used now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # some kernels refuse: then the peak is over the process's lifetime
        Path("/proc/self/clear_refs").write_text("5")


def used_memory_bytes(device: torch.device) -> int:
    """Return the memory used now: by the GPU's allocator, or the process's resident set."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def total_memory_bytes(device: torch.device) -> int:
    """Return the total memory: of the GPU (or this process's fraction of it), else of the machine or its container."""
    if device.type == "cuda":
        share = torch.cuda.get_per_process_memory_fraction(device)
        return int(torch.cuda.get_device_properties(device).total_memory * share)
    return min(psutil.virtual_memory().total, _container_limit("memory.max") or 2**63)


def free_memory_bytes(device: torch.device) -> float:
    """Return the memory that this rank may still allocate: on the GPU, else its share of the machine's free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return min(free + reserved, total_memory_bytes(device)) - allocated
    free = psutil.virtual_memory().available
    if limit := _container_limit("memory.max"):
        free = min(free, limit - _container_limit("memory.current"))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _container_limit(name: str) -> int:
    """Return a memory value of the container's cgroup in bytes; 0 if there is none."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return 0

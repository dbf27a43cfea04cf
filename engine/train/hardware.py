"""What the processor at hand can do."""

from __future__ import annotations

import time

import torch

from engine.config import TrainConfig


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


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of a large square matrix product, in FLOP/s: the best of some tries. Costs about 0.1 s."""
    size = 8192 if device.type == "cuda" else 1024
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


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: the GPU's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

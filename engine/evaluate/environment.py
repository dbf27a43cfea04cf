"""The machine and the package versions that results were measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("manta-train", "torch", "ray", "deepspeed", "transformers", "datasets", "pyarrow", "hydra-core", "mlflow")


def machine_info() -> dict[str, Any]:
    """Return the processor, cores, memory in GiB, GPUs and operating system."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "bf16": bool(torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16")),
        "system": platform.platform(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}

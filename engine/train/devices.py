"""Training devices by their datasheets: dense bf16 (fp16 where there is none) matrix products, and memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One device as its maker describes it."""

    flops: float  # FLOP/s, dense, without sparsity
    bytes: float  # memory


# nvidia.com's datasheets of the SXM models
DEVICES = {
    "v100_32gb": Device(125e12, 32e9),
    "a100_40gb": Device(312e12, 40e9),
    "a100_80gb": Device(312e12, 80e9),
    "h100_80gb": Device(989e12, 80e9),
    "h200_141gb": Device(989e12, 141e9),
}
RESERVED = 0.08  # share of the memory that the driver, NCCL and fragments take: assumed


def known_device(name: str, memory_bytes: float) -> Device | None:
    """Return the datasheet of the device that calls itself `name` ("NVIDIA A100-SXM4-80GB") and has so much memory."""
    alike = [
        device for key, device in DEVICES.items() if key.split("_")[0].upper() in name.upper().replace("-", " ").split()
    ]
    near = [device for device in alike if abs(memory_bytes / device.bytes - 1) < 0.15]
    return near[0] if near and "PCIE" not in name.upper() else None

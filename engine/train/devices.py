"""Datasheets of training devices: rate of dense bf16 matrix products (fp16 if there is no bf16), and memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device's datasheet."""

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
RESERVED_FRACTION = 0.08  # of the memory, for the driver, NCCL and fragmentation: an assumption


def known_device(name: str, memory_bytes: float) -> Device | None:
    """Return the datasheet of the device with this name ("NVIDIA A100-SXM4-80GB") and about this much memory."""
    candidates = [
        device for key, device in DEVICES.items() if key.split("_")[0].upper() in name.upper().replace("-", " ").split()
    ]
    matches = [device for device in candidates if abs(memory_bytes / device.bytes - 1) < 0.15]
    return matches[0] if matches and "PCIE" not in name.upper() else None

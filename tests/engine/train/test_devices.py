"""Datasheets of devices, found by name and memory."""

from __future__ import annotations

import pytest

from engine.train.devices import DEVICES, known_device


@pytest.mark.parametrize(
    ("name", "gibibytes", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100_80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100_40gb"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100_80gb"),
        ("NVIDIA H200", 139.8, "h200_141gb"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100_32gb"),
        ("NVIDIA A100 80GB PCIe", 79.3, None),
        ("NVIDIA GeForce RTX 4090", 23.6, None),
    ],
)
def test_devices_are_known_by_name_and_memory(name: str, gibibytes: float, known: str | None) -> None:
    assert known_device(name, gibibytes * 2**30) is (DEVICES[known] if known else None)

"""Properties of the machine: precision, matrix-product rate, memory."""

from __future__ import annotations

import pytest
import torch

from engine.config import TrainConfig
from engine.train import hardware

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_is_bf16_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda: has_bf16)
    assert hardware.precision(TrainConfig(precision="auto")) == expected
    assert hardware.precision(TrainConfig(precision="fp32")) == "fp32"


def test_the_matmul_rate_is_positive_and_a_cpu_has_no_datasheet() -> None:
    assert hardware.matmul_peak(CPU, torch.float32, size=64) > 0
    assert hardware.datasheet_flops(CPU, torch.bfloat16) is None


def test_memory_is_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < hardware.used_memory_bytes(CPU) < hardware.total_memory_bytes(CPU)
    hardware.reset_peak_memory(CPU)
    assert hardware.peak_memory_bytes(CPU) > 0
    monkeypatch.setattr(hardware, "_container_limit", lambda name: {"memory.max": 1000, "memory.current": 400}[name])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert hardware.free_memory_bytes(CPU) == 300
    assert hardware.total_memory_bytes(CPU) == 1000

"""The memory check: a trial that does not fit gets a smaller micro-batch, or is refused."""

from __future__ import annotations

import torch

from engine.config import Config, with_values
from engine.sweep.memory_check import MemoryCheck


def test_a_micro_batch_is_halved_until_it_fits(tiny: Config) -> None:
    config = with_values(tiny, {"train.micro_batch": 8})
    memory_check = MemoryCheck(config, slots=2)
    assert memory_check.worker_memory_bytes is not None
    assert memory_check.fit_micro_batch(config) == (config, "")
    memory_check.worker_memory_bytes = memory_check._needed_bytes(with_values(config, {"train.micro_batch": 2}))
    fitted, _ = memory_check.fit_micro_batch(config)
    assert fitted is not None
    assert fitted.train.micro_batch == 2
    automatic = with_values(config, {"train.micro_batch": None})  # the trial finds the largest itself
    assert memory_check.fit_micro_batch(automatic) == (automatic, "")
    memory_check.worker_memory_bytes = 1000
    assert memory_check.fit_micro_batch(automatic)[0] is None
    refused, reason = memory_check.fit_micro_batch(config)
    assert refused is None
    assert "with a micro-batch of 1" in reason


def test_memory_is_shared_by_concurrent_trials_and_their_workers(tiny: Config) -> None:
    alone, four = MemoryCheck(tiny, slots=1), MemoryCheck(with_values(tiny, {"train.workers": 2}), slots=2)
    assert alone.worker_memory_bytes is not None
    assert four.worker_memory_bytes is not None
    assert abs(alone.worker_memory_bytes / four.worker_memory_bytes - 4) < 0.2
    full, half = (
        MemoryCheck(with_values(tiny, {"plan.device": "v100_32gb"}), slots=2, gpus=gpus) for gpus in (1.0, 0.5)
    )
    assert full.worker_memory_bytes is not None
    assert half.worker_memory_bytes == full.worker_memory_bytes / 2
    assert 26e9 < full.worker_memory_bytes < 34.4e9
    if not torch.cuda.is_available():
        assert MemoryCheck(tiny, slots=2, gpus=0.5).worker_memory_bytes is None  # unknown: it may be on another machine

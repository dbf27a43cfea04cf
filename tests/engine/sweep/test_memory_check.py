"""A trial that cannot fit is refused, or gets a smaller micro-batch, by the plan's word."""

from __future__ import annotations

import torch

from engine.config import Config, with_values
from engine.sweep.memory_check import MemoryCheck


def test_a_micro_batch_is_halved_until_it_fits(tiny: Config) -> None:
    config = with_values(tiny, {"train.micro_batch": 8})
    room = MemoryCheck(config, slots=2)
    assert room.bytes is not None
    assert room.fitted(config) == (config, "")
    room.bytes = room._need(with_values(config, {"train.micro_batch": 2}))
    fitted, _ = room.fitted(config)
    assert fitted is not None
    assert fitted.train.micro_batch == 2
    own = with_values(config, {"train.micro_batch": None})  # it finds the largest for itself
    assert room.fitted(own) == (own, "")
    room.bytes = 1000
    assert room.fitted(own)[0] is None
    refused, reason = room.fitted(config)
    assert refused is None
    assert "with one sample at a time" in reason


def test_room_is_shared_by_the_trials_and_their_workers(tiny: Config) -> None:
    alone, four = MemoryCheck(tiny, slots=1), MemoryCheck(with_values(tiny, {"train.workers": 2}), slots=2)
    assert alone.bytes is not None
    assert four.bytes is not None
    assert abs(alone.bytes / four.bytes - 4) < 0.2
    whole, half = (
        MemoryCheck(with_values(tiny, {"plan.device": "v100_32gb"}), slots=2, gpus=gpus) for gpus in (1.0, 0.5)
    )
    assert whole.bytes is not None
    assert half.bytes == whole.bytes / 2
    assert 26e9 < whole.bytes < 34.4e9
    if not torch.cuda.is_available():
        assert MemoryCheck(tiny, slots=2, gpus=0.5).bytes is None  # of another machine: not known

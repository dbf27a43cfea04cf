"""The C++ operations against those in Python: the same logits, the same KV cache."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch

from engine.serve.llm.cpu import kernels
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import BatchedRunner, ScheduledSequence
from tests.engine.serve.llm.engine_harness import model

# Contiguous slots and others, one token and several, the first chunk of a prompt and a later one.
STEPS = (
    [
        ScheduledSequence(0, 0, list(range(3, 40)), 1),
        ScheduledSequence(2, 0, [7, 8, 9], 3),
        ScheduledSequence(3, 0, [5], 1),
    ],
    [
        ScheduledSequence(0, 37, [11], 1),
        ScheduledSequence(1, 0, list(range(9, 27)), 0),
        ScheduledSequence(2, 3, [4, 6], 2),
        ScheduledSequence(3, 1, [12], 1),
    ],
    [
        ScheduledSequence(0, 38, [2], 1),
        ScheduledSequence(1, 18, list(range(30, 50)), 20),
        ScheduledSequence(3, 2, [40], 1),
    ],
)


@pytest.mark.skipif(not kernels.load(), reason="no compiler for C++")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_logits_and_cache_equal_those_in_python(family: str, dtype: torch.dtype, tolerance: float) -> None:
    own_model = copy.deepcopy(model(family)).to(dtype)
    runners = [BatchedRunner(each, LoraAdapters(each)) for each in (own_model, copy.deepcopy(own_model))]
    assert all(runner.uses_kernels for runner in runners)
    runners[1].uses_kernels = False
    with torch.inference_mode():
        for runner in runners:
            runner.reshape(4, 64)
        for batch in STEPS:
            logits, expected = (runner.run(batch).float() for runner in runners)
            scale = float(expected.abs().max())
            assert float((logits - expected).abs().max()) <= tolerance * scale
        for keys, expected in zip(runners[0]._keys.values(), runners[1]._keys.values(), strict=True):
            assert float((keys - expected).abs().max()) <= tolerance * float(expected.abs().max())
            assert bool(expected[1, :, :38].abs().sum(-1).all()), "the steps wrote there"


def test_missing_compiler_is_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with caplog.at_level(logging.WARNING):
        assert kernels.load.__wrapped__() is False
    assert "cpp can't be built" in caplog.text

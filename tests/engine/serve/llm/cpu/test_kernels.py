"""The operations in C++ against those in Python: the same logits, the same cache."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch

from engine.serve.llm.cpu import kernels
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import BatchedRunner, ScheduledSequence
from tests.engine.serve.llm.test_engine import model

# Lanes that follow each other and not, one token and several, a prompt's parts, the first and a later one.
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
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_they_are_those_in_python(kind: str, dtype: torch.dtype, off: float) -> None:
    own = copy.deepcopy(model(kind)).to(dtype)
    forwards = [BatchedRunner(one, LoraAdapters(one)) for one in (own, copy.deepcopy(own))]
    assert all(forward.in_kernels for forward in forwards)
    forwards[1].in_kernels = False
    with torch.inference_mode():
        for forward in forwards:
            forward.shape(4, 64)
        for parts in STEPS:
            ours, theirs = (forward.run(parts).float() for forward in forwards)
            scale = float(theirs.abs().max())
            assert float((ours - theirs).abs().max()) <= off * scale
        for mine, right in zip(forwards[0]._keys.values(), forwards[1]._keys.values(), strict=True):
            assert float((mine - right).abs().max()) <= off * float(right.abs().max())
            assert bool(right[1, :, :38].abs().sum(-1).generate()), "the steps wrote there"


def test_without_a_compiler_all_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with caplog.at_level(logging.WARNING):
        assert kernels.load.__wrapped__() is False
    assert "cpp can't be built" in caplog.text

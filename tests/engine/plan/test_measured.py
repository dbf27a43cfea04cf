"""The planned peak memory is within 10 % of the measured resident memory of real ranks, for each layout."""

from __future__ import annotations

import pytest

from engine.config import Config, with_values
from engine.plan.plan import plan
from tests.conftest import TINY
from tests.engine.plan.measured import measured_peak

MIDDLE = TINY | {  # 42 M parameters, so that the process's own memory is small compared with theirs
    "model.hidden_size": 512, "model.num_hidden_layers": 8, "model.num_attention_heads": 8, "model.num_key_value_heads": 8,
    "model.intermediate_size": 1408, "model.max_position_embeddings": 512, "model.vocab_size": 16384,
    "model.tie_word_embeddings": False, "data.sequence_length": 128, "train.global_batch": 4, "train.max_steps": 8,
    "train.checkpoint_every": 100, "optim.lr": 1e-4,
}  # fmt: skip
LAYOUTS = {
    "stage 0, fp32": {"zero.stage": 0, "train.micro_batch": 4},
    "stage 0, bf16, 2 workers": {"zero.stage": 0, "train.precision": "bf16", "train.workers": 2},
    "stage 1, bf16": {"zero.stage": 1, "train.precision": "bf16"},
    "stage 1, fp32, 2 workers": {"zero.stage": 1, "train.workers": 2, "train.micro_batch": 1},
    "stage 2, bf16, 2 workers, checkpointing": {
        "zero.stage": 2, "train.precision": "bf16", "train.workers": 2, "train.activation_checkpointing": True,
    },
    "stage 2, fp32, long": {"zero.stage": 2, "data.sequence_length": 512, "train.micro_batch": 2},
    "stage 3, bf16, 2 workers": {"zero.stage": 3, "train.precision": "bf16", "train.workers": 2},
    "stage 3, fp32": {"zero.stage": 3, "train.micro_batch": 1},
}  # fmt: skip


def check_peak(tiny: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Makes the C library return freed blocks at once, of which it otherwise keeps up to a fifth: resident memory is memory in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    folder = "".join(letter if letter.isalnum() else "-" for letter in name)
    config = with_values(tiny, MIDDLE | LAYOUTS[name] | {"name": folder, "runs_dir": tiny.runs_dir})
    result = plan(config)
    need, measured = result.memory_of(config), measured_peak(config)
    assert need.total == pytest.approx(measured, rel=0.1), f"{need} against {measured / 2**20:.0f} MiB"


def test_the_peak_of_one_layout(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    check_peak(tiny, "stage 1, bf16", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "stage 1, bf16"])
def test_the_peak_of_every_layout(tiny: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_peak(tiny, name, monkeypatch)

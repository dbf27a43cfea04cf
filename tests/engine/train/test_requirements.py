"""Options that this machine does not support are refused before Ray starts; fp16 training and its loss scale."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train import requirements
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.requirements import check_machine
from engine.train.run_folder import RunFolder
from jobs import pretrain
from tests.engine.train.ranks import losses, on_ranks, train_jobs


@pytest.mark.skipif(torch.cuda.is_available(), reason="supported on a GPU")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.attention": "flex_attention"}, "trains on GPUs only, and this machine has none: use model.attention=sdpa"),
        ({"model.attention": "flash_attention_2"}, "needs the package flash_attn, which is not installed: use model.attention=sdpa"),
        ({"zero.options": {"zero_quantized_weights": True}}, r"zero.options.zero_quantized_weights needs a GPU, and this machine has none: leave it out"),
        ({"train.precision": "fp16"}, "needs a GPU, or a CPU with fp16, and this machine has neither: use train.precision=bf16"),
    ],
)  # fmt: skip
def test_unsupported_options_are_refused_with_a_reason(
    values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "has_fp16", lambda: False)
    with pytest.raises(UserError, match=message):
        check_machine(with_values(Config(), values))
    overrides = [f"{key}={str(value).replace(chr(39), '')}" for key, value in values.items()]
    assert pretrain.main(overrides) == 2
    assert message in capsys.readouterr().err


def test_torchs_attention_implementations_run_on_any_machine() -> None:
    for name in ("sdpa", "eager"):
        check_machine(with_values(Config(), {"model.attention": name}))


def train_in_fp16(rank: int, world_size: int, specs: str, first_scale: float) -> None:
    """Run jobs in fp16 even where the CPU emulates it; the initial loss scale is so large that it must fall."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from engine.train import worker

    requirements.has_fp16 = lambda: True
    CPU_Accelerator.is_fp16_supported = lambda self: True
    worker.INITIAL_LOSS_SCALE = first_scale
    worker.hardware.matmul_peak = lambda device, dtype: 1e9  # a large emulated product would take minutes
    train_jobs(rank, world_size, specs)


@pytest.mark.slow
def test_fp16_unscales_gradients_and_resumes_the_loss_scale(tiny: Config) -> None:
    data = prepare(tiny)
    base = with_values(tiny, {"train.workers": 2, "train.max_steps": 8, "optim.lr": 1e-9, "train.max_skipped": 0})
    trios = []
    for stage in (0, 2, 3):
        half = with_values(base, {"zero.stage": stage, "train.precision": "fp16", "train.checkpoint_every": 4})
        part = with_values(half, {"name": f"parts{stage}", "schedule.total_steps": 8})
        trios.append([with_values(half, {"name": f"full{stage}"}), with_values(part, {"train.max_steps": 4}), part])
    exact = with_values(base, {"name": "exact"})
    configs = [exact, *(config for trio in trios for config in trio)]
    on_ranks(train_in_fp16, 2, json.dumps([TrainJob(config, data).to_dict() for config in configs]), 2.0**22)
    expected = list(RunFolder(exact.run_dir).metrics())
    for full, _, part in trios:
        lines, parts = (list(RunFolder(config.run_dir).metrics()) for config in (full, part))
        states = [Checkpoint(step_folders(config.run_dir / "checkpoints")[0]).state for config in (full, part)]
        assert losses(parts) == losses(lines)
        assert [(state.loss_scale, state.steady, state.skipped) for state in states[:1]] == [
            (state.loss_scale, state.steady, state.skipped) for state in states[1:]
        ]
        skipped = lines[-1]["skipped"]
        assert 0 < skipped < 8
        assert states[0].loss_scale == 2.0 ** (22 - skipped)
        for line, other in zip(
            lines, expected, strict=True
        ):  # the learning rate is so small that the weights hardly change
            if line["loss"] is not None:
                assert line["loss"] == pytest.approx(other["loss"], abs=1e-2)
                assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)

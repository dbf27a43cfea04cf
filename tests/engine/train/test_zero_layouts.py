"""Options that save memory or time do not change the loss: offload, activation checkpointing, compilation, micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.micro_batch import CACHE_FILE
from tests.engine.train.ranks import losses, run_here, run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"zero.stage": 0},
    "recomputed": {"zero.stage": 0, "train.activation_checkpointing": True},
    "recomputed3": {"zero.stage": 3, "train.activation_checkpointing": True},
    "offloaded1": {"zero.stage": 1, "zero.offload_optimizer": "cpu"},
    "offloaded2": {"zero.stage": 2, "zero.offload_optimizer": "cpu"},
    "offloaded3": {"zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_param": "cpu"},
    "buckets": {"zero.stage": 2, "zero.options": {"reduce_bucket_size": 500, "round_robin_gradients": True}},
    "automatic": {"zero.stage": 2, "train.micro_batch": None},
    "automatic3": {"zero.stage": 3, "train.micro_batch": None},
}


def weights(config: Config) -> dict[str, torch.Tensor]:
    return Checkpoint(step_folders(config.run_dir / "checkpoints")[0]).weights()


def test_every_layout_option_gives_the_same_curve(tiny: Config, tmp_path: Path) -> None:
    data = prepare(tiny)
    base = with_values(tiny, {"train.workers": 2, "runs_dir": str(tmp_path), "model.tie_word_embeddings": True})
    jobs = [TrainJob(with_values(base, {**change, "name": name}), data) for name, change in LAYOUTS.items()]
    curves = dict(zip(LAYOUTS, run_ranks(jobs, 2), strict=True))
    first = losses(curves["plain"])
    assert len(first) == 6
    for name, lines in curves.items():
        assert losses(lines) == pytest.approx(first, abs=1e-5), name
        assert lines[-1]["validation_loss"] == pytest.approx(curves["plain"][-1]["validation_loss"], abs=1e-5), name
    # Each worker has 4 of the 8 samples of a step, which fit in memory.
    entries = json.loads((tmp_path / CACHE_FILE).read_text())
    assert [entry["micro_batch"] > 4 for entry in entries.values()] == [True, True]


@pytest.mark.slow
def test_offload_resumes_bit_for_bit_and_in_another_layout(tiny: Config, tmp_path: Path) -> None:
    data = prepare(tiny)
    base = with_values(tiny, {"train.workers": 2, "runs_dir": str(tmp_path), "schedule.total_steps": 6})
    for stage in (2, 3):
        offloaded = with_values(base, {"zero.stage": stage, "zero.offload_optimizer": "cpu"})
        straight = with_values(offloaded, {"name": f"straight{stage}"})
        halves = [with_values(offloaded, {"name": f"halves{stage}", "train.max_steps": until}) for until in (3, 6)]
        moved = [
            with_values(offloaded, {"name": f"moved{stage}", "train.max_steps": 3}),
            with_values(base, {"name": f"moved{stage}", "zero.stage": 1}),
        ]
        lines, _, resumed, _, elsewhere = run_ranks([TrainJob(c, data) for c in (straight, *halves, *moved)], 2)
        assert losses(resumed) == losses(lines)
        assert losses(elsewhere) == pytest.approx(losses(lines), abs=1e-5)
        for name, tensor in weights(straight).items():
            assert torch.equal(tensor, weights(halves[1])[name]), name


def test_a_dry_batch_changes_no_bit(tiny: Config, tmp_path: Path) -> None:
    data = prepare(tiny)
    for stage in (0, 1, 2, 3):
        base = with_values(
            tiny, {"runs_dir": str(tmp_path), "zero.stage": stage, "model.dropout": 0.1, "train.max_steps": 4}
        )
        automatic = with_values(base, {"name": f"automatic{stage}", "train.micro_batch": None})
        fixed = with_values(base, {"name": f"fixed{stage}", "train.micro_batch": 8})
        cached = with_values(base, {"name": f"cached{stage}", "train.micro_batch": None})
        results = run_here([TrainJob(config, data) for config in (automatic, fixed, cached)])
        assert losses(results[0]) == losses(results[1]) == losses(results[2])
        for name, tensor in weights(automatic).items():
            assert torch.equal(tensor, weights(fixed)[name]), name


@pytest.mark.slow
def test_hierarchical_partitioning_gives_the_same_curve(tiny: Config, tmp_path: Path) -> None:
    base = with_values(tiny, {"train.workers": 4, "runs_dir": str(tmp_path), "zero.stage": 3})
    grouped = with_values(base, {"name": "grouped", "zero.options": {"zero_hpz_partition_size": 2}})
    plain, within = run_ranks([TrainJob(config, prepare(base)) for config in (base, grouped)], 4)
    assert losses(within) == pytest.approx(losses(plain), abs=1e-5)


def test_an_option_that_deepspeed_does_not_know_is_refused(tiny: Config) -> None:
    with pytest.raises(UserError, match=r"zero\.options\.stage has an option of its own"):
        with_values(tiny, {"zero.options": {"stage": 1}})
    with pytest.raises(
        UserError, match="is not an option of DeepSpeed's ZeRO config; did you mean 'reduce_bucket_size'"
    ):
        run_here([TrainJob(with_values(tiny, {"zero.options": {"reduce_bucket": 1}}), prepare(tiny))])


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_curve(tiny: Config) -> None:
    data = prepare(tiny)
    changes = {"train.max_steps": 3, "zero.stage": 1, "train.evaluate_samples": 4}
    jobs = [
        TrainJob(with_values(tiny, {**changes, "name": name, "train.compile": name == "compiled"}), data)
        for name in ("interpreted", "compiled")
    ]
    interpreted, compiled = run_here(jobs)
    assert losses(compiled) == pytest.approx(losses(interpreted), abs=1e-5)


def test_a_global_batch_in_tokens_equals_one_in_samples(tiny: Config) -> None:
    config = with_values(tiny, {"train.global_batch": None, "train.global_batch_tokens": 8 * 32})
    assert config.global_batch == 8
    assert with_values(Config(), {}).global_batch == 32
    with pytest.raises(UserError, match=r"both set the size of a step: use one of them"):
        with_values(tiny, {"train.global_batch_tokens": 256})
    with pytest.raises(
        UserError, match=r"not a multiple of data\.sequence_length 32: use train\.global_batch_tokens=256"
    ):
        with_values(config, {"train.global_batch_tokens": 250})

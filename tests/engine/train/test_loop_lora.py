"""LoRA fine-tuning: the same curve in all layouts, bit for bit on resume, and from a start state in the object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.serve.llm.lora import load_adapter, pin_adapters
from engine.sweep.start_weights import make_start_state, start_state_factory
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.init_model import make_model
from engine.train.job import TrainJob
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.train.ranks import losses, run_here, run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "stage0": {"zero.stage": 0},
    "stage2": {"zero.stage": 2},
    "stage3": {"zero.stage": 3},
    "recomputed": {"zero.stage": 3, "train.activation_checkpointing": True},
    "offloaded": {"zero.stage": 2, "zero.offload_optimizer": "cpu"},
}


@pytest.fixture(scope="module")
def tuned(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Return a LoRA fine-tuning job of a random bundle."""
    runs = tmp_path_factory.mktemp("lora")
    base = fresh_bundle(tiny, runs / "base" / "bundle").folder
    config = with_values(
        tiny, {"job": "finetune", "bundle": str(base), "runs_dir": str(runs), "objective.lora.rank": 4, "seed": 5}
    )
    return TrainJob(config, prepare(tiny), base)


def named(job: TrainJob, name: str, **changes: Any) -> TrainJob:
    return TrainJob(with_values(job.config, {"name": name, **changes}), job.data_folder, job.start_bundle)


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return Checkpoint(step_folders(job.config.run_dir / "checkpoints")[0]).weights()


def test_all_layouts_give_the_same_curve(tuned: TrainJob) -> None:
    jobs = [named(tuned, name, **{"train.workers": 2, **change}) for name, change in LAYOUTS.items()]
    curves = dict(zip(LAYOUTS, run_ranks(jobs, 2), strict=True))
    (alone,) = run_here([named(tuned, "alone")])
    assert alone[0]["loss"] - alone[-1]["loss"] > 0.05  # it learns
    for name, lines in curves.items():
        assert losses(lines) == pytest.approx(losses(alone), abs=1e-5), name
    start = make_model(tuned, tuned.objective())
    frozen = {name for name, p in start.named_parameters() if not p.requires_grad}
    for job in (jobs[0], jobs[2]):
        after = weights(job)
        for name, p in start.named_parameters():
            assert torch.equal(after[name], p) == (name in frozen), name


def test_resume_is_bit_equal_and_the_bundle_has_the_merged_adapter(tuned: TrainJob) -> None:
    until = {"schedule.total_steps": 6}
    straight, *halves = (
        named(tuned, name, **until, **{"train.max_steps": steps})
        for name, steps in (("straight", 6), ("halves", 3), ("halves", 6))
    )
    run_here([straight, *halves])
    actual, expected = weights(straight), weights(halves[1])
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    folder = straight.config.run_dir
    bundle = Bundle.open(folder / "bundle")
    bundle.verify()
    merged: Any = bundle.model()
    base = AutoModelForCausalLM.from_pretrained(tuned.start_bundle, dtype=torch.float32)
    served = load_adapter(
        "mine", pin_adapters({"mine": str(folder / "adapter")})["mine"], base
    )  # as the endpoint reads it
    assert sum(side.numel() for pair in served.values() for side in pair) == sum(
        p.numel() for p in make_model(straight, straight.objective()).parameters() if p.requires_grad
    )
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    ids = torch.arange(9, 39).reshape(2, 15)
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=0, atol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in Bundle.open(tuned.start_bundle).model().named_parameters()}  # type: ignore[arg-type]  # fmt: skip


def test_trials_of_any_lora_rank_share_the_base_in_the_object_store(tuned: TrainJob) -> None:
    state = make_start_state(tuned)
    for rank in (0, 2, 8):
        trial = named(tuned, f"rank{rank}", **{"objective.lora.rank": rank})
        copied = make_model(trial, trial.objective(), model_factory=start_state_factory(state))
        own = make_model(trial, trial.objective())
        assert [name for name, _ in copied.named_parameters()] == [name for name, _ in own.named_parameters()]
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), own.parameters(), strict=True))
        assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in own.parameters()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.frozen_layers": 1}, "leave out objective.frozen_layers"),
        ({"job": "pretrain", "bundle": None}, "set it with bundle=..., or leave objective.lora out"),
        ({"objective.lora.rank": -1}, "objective.lora.rank=-1 is too small"),
    ],
)
def test_contradictory_options_are_refused_with_a_reason(
    tuned: TrainJob, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        with_values(tuned.config, changes)


def test_the_plan_counts_trained_parameters(tiny: Config, tmp_path: Path) -> None:
    from engine.plan.plan import plan

    full = plan(tiny).sizes
    lora = plan(with_values(tiny, {"job": "plan", "objective.lora.rank": 4})).sizes
    per_block = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert (lora.trainable, lora.moment_elements) == (2 * per_block, 4 * per_block)
    assert lora.parameters == full.parameters + 2 * per_block

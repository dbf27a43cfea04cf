"""A batch whose gradient is no number: all ranks pass over it together, at every stage and precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import Config, with_values
from engine.data.order import Order
from engine.data.packing import Blocks
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.run_folder import RunFolder
from engine.train.worker import Job
from tests.engine.train.ranks import losses, on_ranks, work_on

BAD = 2  # the step, from 0, with the bad sample


def poisoned(rank: int, world: int, specs: str) -> None:
    """Run jobs whose loss is not a number wherever one sample of step BAD is in the batch, on whichever rank."""
    from engine.objectives.causal_lm import Objective

    config = Job.from_dict(json.loads(specs)[0]).config
    blocks = Blocks(Split.open(prepare(config), "train"), config.data.sequence_length)
    sample = Order(len(blocks), config.global_batch, config.seed).samples(BAD)[5]
    tokens = torch.as_tensor(blocks[sample]["tokens"][:-1])
    sound = Objective.loss

    def loss(self: Any, model: Any, batch: Any) -> Any:
        found = sound(self, model, batch)
        hit = (batch.inputs["input_ids"] == tokens).all(1).any()
        return type(found)(found.sum * float("nan"), found.count) if hit else found

    Objective.loss = loss  # type: ignore[method-assign]
    work_on(rank, world, specs)


def run(config: Config, name: str, world: int, *changes: dict[str, object]) -> list[dict[str, Any]]:
    data = prepare(config)
    jobs = [
        Job(with_values(config, {"name": name, "train.workers": world, "schedule.total_steps": 6, **change}), data)
        for change in changes or ({},)
    ]
    on_ranks(poisoned, world, json.dumps([job.to_dict() for job in jobs]))
    return list(RunFolder(jobs[-1].config.run_dir).metrics())


def weights(config: Config, name: str) -> dict[str, torch.Tensor]:
    return Checkpoint(step_folders(Path(config.runs_dir) / name / "checkpoints")[0]).weights()


@pytest.fixture(scope="module")
def alone(tiny: Config) -> list[dict[str, Any]]:
    return run(tiny, "bad-alone", 1, {"zero.stage": 0})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_batch_is_skipped_by_all_ranks(
    tiny: Config, alone: list[dict[str, Any]], stage: int, precision: str
) -> None:
    name = f"bad-{stage}-{precision}"
    lines = run(tiny, name, 2, {"zero.stage": stage, "train.precision": precision})
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[BAD]["loss"] is None
    assert lines[BAD]["grad_norm"] is None
    sound = [step for step in range(6) if step != BAD]
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert [lines[s]["loss"] for s in sound] == pytest.approx([alone[s]["loss"] for s in sound], abs=tolerance)
    assert all(weight.isfinite().all() for weight in weights(tiny, name).values())
    assert [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in alone]


def test_a_skipped_step_is_no_update_of_adam_after_a_resume(tiny: Config) -> None:
    straight = run(tiny, "bad-straight", 1, {"zero.stage": 2})
    halves = run(tiny, "bad-halves", 1, {"zero.stage": 2, "train.max_steps": 4}, {"zero.stage": 2})
    assert losses(halves) == losses(straight)
    for name, weight in weights(tiny, "bad-halves").items():
        np.testing.assert_array_equal(weight.numpy(), weights(tiny, "bad-straight")[name].numpy())


def test_none_may_be_skipped_if_so_asked(tiny: Config) -> None:
    with pytest.raises(Exception, match=r"the loss is nan and the gradient norm .* at step 3: use a lower optim.lr"):
        run(tiny, "bad-strict", 1, {"zero.stage": 1, "train.max_skipped": 0})

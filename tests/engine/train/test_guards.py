"""Guards: all ranks skip a bad batch together, at every stage and precision; spikes are skipped and rolled back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, TrainConfig, with_values
from engine.data.order import DataOrder, add_hashes, hash_hex, ids_hash
from engine.data.packing import Blocks
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.train import guards
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder
from engine.train.train_state import TrainState
from tests.engine.train.ranks import losses, on_ranks, train_jobs

BAD = 2  # the step, from 0, with the bad sample


def train_with_nan_loss(rank: int, world_size: int, specs: str) -> None:
    """Run jobs whose loss is NaN in the batch that has a certain sample of step BAD, on whichever rank."""
    from engine.objectives.causal_lm import CausalLM

    config = TrainJob.from_dict(json.loads(specs)[0]).config
    blocks = Blocks(Split.open(prepare(config), "train"), config.data.sequence_length)
    sample = DataOrder(len(blocks), config.global_batch, config.seed).sample_ids(BAD)[5]
    tokens = torch.as_tensor(blocks[sample]["tokens"][:-1])
    original = CausalLM.loss

    def loss(self: Any, model: Any, batch: Any) -> Any:
        value = original(self, model, batch)
        is_bad = (batch.inputs["input_ids"] == tokens).all(1).any()
        return type(value)(value.sum * float("nan"), value.count) if is_bad else value

    CausalLM.loss = loss  # type: ignore[method-assign]
    train_jobs(rank, world_size, specs)


def make_job(config: Config, name: str, world_size: int, changes: dict[str, object]) -> TrainJob:
    layout = {"name": name, "train.workers": world_size, "schedule.total_steps": config.train.max_steps}
    return TrainJob(with_values(config, layout | changes), prepare(config))


def run(ranks: Callable[..., None], world_size: int, jobs: list[TrainJob]) -> dict[str, list[dict[str, Any]]]:
    """Run jobs one after the other on one group (starting a group takes longer than a job); return their lines by name."""
    on_ranks(ranks, world_size, json.dumps([job.to_dict() for job in jobs]))
    return {job.config.name: list(RunFolder(job.config.run_dir).metrics()) for job in jobs}


def latest(config: Config, name: str) -> Checkpoint:
    return Checkpoint(step_folders(Path(config.runs_dir) / name / "checkpoints")[0])


def assert_equal(config: Config, first: str, second: str) -> None:
    """Assert that two runs ended bit for bit equal."""
    assert latest(config, first).state == latest(config, second).state
    for key, weight in latest(config, first).weights().items():
        assert torch.equal(weight, latest(config, second).weights()[key]), key


BOTH = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def bad(tiny: Config) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of runs with a bad batch: on one rank, uninterrupted and in halves, and on two ranks."""
    alone = [
        make_job(tiny, "bad-alone", 1, {"zero.stage": 0}),
        make_job(tiny, "bad-straight", 1, {"zero.stage": 2}),
        make_job(tiny, "bad-halves", 1, {"zero.stage": 2, "train.max_steps": 4}),
        make_job(tiny, "bad-halves", 1, {"zero.stage": 2}),
    ]
    two = [
        make_job(tiny, f"bad-{stage}-{precision}", 2, {"zero.stage": stage, "train.precision": precision})
        for stage, precision in BOTH
    ]
    return run(train_with_nan_loss, 1, alone) | run(train_with_nan_loss, 2, two)


@pytest.mark.parametrize(("stage", "precision"), BOTH)
def test_a_bad_batch_is_skipped_by_all_ranks(
    tiny: Config, bad: dict[str, list[dict[str, Any]]], stage: int, precision: str
) -> None:
    lines, alone = bad[f"bad-{stage}-{precision}"], bad["bad-alone"]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[BAD]["loss"] is None
    assert lines[BAD]["grad_norm"] is None
    assert lines[BAD]["fault"] == "the loss is nan"
    good = [step for step in range(6) if step != BAD]
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert [lines[s]["loss"] for s in good] == pytest.approx([alone[s]["loss"] for s in good], abs=tolerance)
    assert all(weight.isfinite().all() for weight in latest(tiny, f"bad-{stage}-{precision}").weights().values())
    assert [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in alone]


def test_a_skipped_step_does_not_count_as_an_adam_update_after_a_resume(
    tiny: Config, bad: dict[str, list[dict[str, Any]]]
) -> None:
    assert losses(bad["bad-halves"]) == losses(bad["bad-straight"])
    assert_equal(tiny, "bad-halves", "bad-straight")


STEADY = [2.0 + 0.1 * (i % 2) for i in range(8)]  # mean 2.05, standard deviation 0.05


@pytest.mark.parametrize(
    ("loss", "recent", "sigma", "fault"),
    [
        (2.2, STEADY, 6.0, ""),
        (2.36, STEADY, 6.0, "a spike"),
        (2.36, STEADY, 7.0, ""),
        (2.36, STEADY[1:], 6.0, ""),  # too few losses
        (0.1, STEADY, 6.0, ""),  # a low loss is no spike
        (99.0, STEADY, None, ""),
        (math.nan, [], None, "the loss is nan"),
        (math.inf, STEADY, 6.0, "the loss is inf"),
    ],
)
def test_check_loss(loss: float, recent: list[float], sigma: float | None, fault: str) -> None:
    train = TrainConfig(spike_sigma=sigma, spike_window=8)
    message = guards.check_loss(loss, recent, train)
    assert fault in message
    assert bool(fault) == bool(message)


@pytest.mark.parametrize(
    ("fault", "in_a_row", "rollbacks", "decision"),
    [
        ("", 0, 0, guards.AcceptStep()),
        ("", 3, 2, guards.AcceptStep()),
        ("f", 0, 0, guards.SkipStep("f")),
        ("f", 1, 2, guards.SkipStep("f")),
        ("f", 2, 0, guards.RollBack("f, after 2 in a row were skipped")),
        ("f", 2, 1, guards.StopRun("f, after 2 in a row were skipped and 1 rollbacks")),
    ],
)
def test_decisions(fault: str, in_a_row: int, rollbacks: int, decision: guards.Decision) -> None:
    state = TrainState(skipped_in_a_row=in_a_row, rollbacks=rollbacks)
    assert guards.decide(fault, state, TrainConfig(max_skipped=2, max_rollbacks=1)) == decision


def test_in_fp16_the_scale_may_fall_all_the_way() -> None:
    train = TrainConfig(max_skipped=2, max_rollbacks=0)
    assert guards.decide("f", TrainState(skipped_in_a_row=17, loss_scale=2.0**16), train) == guards.SkipStep("f")
    assert isinstance(guards.decide("f", TrainState(skipped_in_a_row=18, loss_scale=2.0**16), train), guards.StopRun)


def test_the_window_of_recent_losses() -> None:
    train = TrainConfig(spike_sigma=6.0, spike_window=3)
    assert guards.append_recent_loss((1.0, 2.0, 3.0), 4.0, train) == (2.0, 3.0, 4.0)
    assert guards.append_recent_loss((1.0,), 4.0, TrainConfig()) == ()


BAD_DATA_STEPS = (12, 13, 14)  # steps of the data order whose batches are bad
STEPS = 24
SPIKY = {
    "train.max_steps": STEPS, "train.checkpoint_every": 4, "train.spike_sigma": 6.0, "train.spike_window": 6,
    "train.max_skipped": 2, "optim.lr": 2e-3, "schedule.total_steps": STEPS,
}  # fmt: skip
SAME = ("step", "loss", "grad_norm", "skipped", "rollbacks", "passed", "samples_hash", "tokens")


def train_with_spikes(rank: int, world_size: int, specs: str) -> None:
    """Run jobs whose loss is 100 times as high at BAD_DATA_STEPS; the error that ends a job is written to failed.txt."""
    from engine.train import loop

    original = loop.collate_rank_batches

    def collate_rank_batches(run: Any, ids: Any, draws: Any) -> Any:
        batches, rank_ids = original(run, ids, draws)
        factor = 100.0 if run.state.data_step in BAD_DATA_STEPS else 1.0
        return [(batch, weight * factor) for batch, weight in batches], rank_ids

    loop.collate_rank_batches = collate_rank_batches
    for spec in json.loads(specs):
        try:
            train_jobs(rank, world_size, json.dumps([spec]))
        except UserError as error:
            (RunFolder(TrainJob.from_dict(spec).config.run_dir).logs / "failed.txt").write_text(str(error))


@pytest.fixture(scope="module")
def spiky(tiny: Config) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of runs with three bad batches in a row, of which two may be skipped."""

    def spiky_job(name: str, world_size: int, stage: int, **changes: object) -> TrainJob:
        return make_job(
            tiny,
            f"spiky-{name}",
            world_size,
            SPIKY | {"zero.stage": stage} | {f"train.{k}": v for k, v in changes.items()},
        )

    # The halves stop after one skipped step, then two steps after the rollback, where no checkpoint is due.
    alone = [spiky_job(name, 1, stage) for name, stage in (("zero", 0), ("two", 2), ("three", 3))]
    alone += [spiky_job(f"halves-{stage}", 1, stage, max_steps=until) for stage in (0, 3) for until in (13, 14, STEPS)]
    alone += [spiky_job("end", 1, 1, max_rollbacks=0), spiky_job("lost", 1, 1, checkpoint_every=13)]
    return run(train_with_spikes, 1, alone) | run(
        train_with_spikes, 2, [spiky_job("two-1", 2, 1), spiky_job("two-3", 2, 3)]
    )


def test_spikes_are_skipped_then_rolled_back_and_their_data_skipped(spiky: dict[str, list[dict[str, Any]]]) -> None:
    # Steps 13 and 14 are skipped; the third bad one rolls back to step 12 and skips the data steps 12, 13 and 14.
    lines = spiky["spiky-zero"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["passed"] for line in lines] == [0] * 12 + [3] * 12
    assert [line["rollbacks"] for line in lines] == [0] * 12 + [1] * 12
    assert {line["skipped"] for line in lines} == {0}
    assert lines[12]["rolled_back"].startswith("from step 15 back to step 12: the loss")
    assert all(line["loss"] < 10 for line in lines)


def test_skipped_data_are_never_seen(tiny: Config, spiky: dict[str, list[dict[str, Any]]]) -> None:
    blocks = Blocks(Split.open(prepare(tiny), "train"), tiny.data.sequence_length)
    order = DataOrder(len(blocks), tiny.train.global_batch, tiny.seed)
    data_steps = [step for step in range(STEPS + 3) if step not in BAD_DATA_STEPS]
    assert spiky["spiky-zero"][-1]["samples_hash"] == hash_hex(
        add_hashes(ids_hash(order.sample_ids(p)) for p in data_steps)
    )


@pytest.mark.parametrize("name", ["two", "three", "two-1", "two-3"])
def test_a_rollback_is_the_same_in_any_layout(spiky: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert losses(spiky[f"spiky-{name}"]) == pytest.approx(losses(spiky["spiky-zero"]), abs=1e-5)
    assert [line["samples_hash"] for line in spiky[f"spiky-{name}"]] == [
        line["samples_hash"] for line in spiky["spiky-zero"]
    ]


@pytest.mark.parametrize(("stage", "uninterrupted"), [(0, "zero"), (3, "three")])
def test_a_resume_around_a_rollback_is_bit_equal(
    tiny: Config, spiky: dict[str, list[dict[str, Any]]], stage: int, uninterrupted: str
) -> None:
    for line, other in zip(spiky[f"spiky-halves-{stage}"], spiky[f"spiky-{uninterrupted}"], strict=True):
        assert {name: line[name] for name in SAME} == {name: other[name] for name in SAME}
    assert_equal(tiny, f"spiky-halves-{stage}", f"spiky-{uninterrupted}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "end",
            r"step 15: the loss .* is a spike: more than 6 x .*, after 2 in a row were skipped: use a lower optim.lr",
        ),
        ("lost", r"and there is no good checkpoint to go back to"),
    ],
)
def test_a_stopped_run_has_a_reason(
    tiny: Config, spiky: dict[str, list[dict[str, Any]]], name: str, message: str
) -> None:
    assert re.search(message, (Path(tiny.runs_dir) / f"spiky-{name}" / "logs" / "failed.txt").read_text())

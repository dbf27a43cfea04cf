"""A batch whose gradient is no number: all ranks pass over it together, at every stage and precision."""

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
from tests.engine.train.ranks import losses, on_ranks, work_on

BAD = 2  # the step, from 0, with the bad sample


def poisoned(rank: int, world: int, specs: str) -> None:
    """Run jobs whose loss is not a number wherever one sample of step BAD is in the batch, on whichever rank."""
    from engine.objectives.causal_lm import CausalLM

    config = TrainJob.from_dict(json.loads(specs)[0]).config
    blocks = Blocks(Split.open(prepare(config), "train"), config.data.sequence_length)
    sample = DataOrder(len(blocks), config.global_batch, config.seed).sample_ids(BAD)[5]
    tokens = torch.as_tensor(blocks[sample]["tokens"][:-1])
    sound = CausalLM.loss

    def loss(self: Any, model: Any, batch: Any) -> Any:
        found = sound(self, model, batch)
        hit = (batch.inputs["input_ids"] == tokens).all(1).any()
        return type(found)(found.sum * float("nan"), found.count) if hit else found

    CausalLM.loss = loss  # type: ignore[method-assign]
    work_on(rank, world, specs)


def make(config: Config, name: str, world: int, changes: dict[str, object]) -> TrainJob:
    layout = {"name": name, "train.workers": world, "schedule.total_steps": config.train.max_steps}
    return TrainJob(with_values(config, layout | changes), prepare(config))


def run(ranks: Callable[..., None], world: int, jobs: list[TrainJob]) -> dict[str, list[dict[str, Any]]]:
    """Run jobs one after the other on one group (starting one takes longer than a job); return their lines by name."""
    on_ranks(ranks, world, json.dumps([job.to_dict() for job in jobs]))
    return {job.config.name: list(RunFolder(job.config.run_dir).metrics()) for job in jobs}


def latest(config: Config, name: str) -> Checkpoint:
    return Checkpoint(step_folders(Path(config.runs_dir) / name / "checkpoints")[0])


def assert_equal(config: Config, one: str, other: str) -> None:
    """Assert that two runs ended bit for bit alike."""
    assert latest(config, one).state == latest(config, other).state
    for key, weight in latest(config, one).weights().items():
        assert torch.equal(weight, latest(config, other).weights()[key]), key


BOTH = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def bad(tiny: Config) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of runs with a bad batch: alone, straight, in halves, and on two ranks at each stage and precision."""
    alone = [
        make(tiny, "bad-alone", 1, {"zero.stage": 0}),
        make(tiny, "bad-straight", 1, {"zero.stage": 2}),
        make(tiny, "bad-halves", 1, {"zero.stage": 2, "train.max_steps": 4}),
        make(tiny, "bad-halves", 1, {"zero.stage": 2}),
    ]
    two = [
        make(tiny, f"bad-{stage}-{precision}", 2, {"zero.stage": stage, "train.precision": precision})
        for stage, precision in BOTH
    ]
    return run(poisoned, 1, alone) | run(poisoned, 2, two)


@pytest.mark.parametrize(("stage", "precision"), BOTH)
def test_a_bad_batch_is_skipped_by_all_ranks(
    tiny: Config, bad: dict[str, list[dict[str, Any]]], stage: int, precision: str
) -> None:
    lines, alone = bad[f"bad-{stage}-{precision}"], bad["bad-alone"]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[BAD]["loss"] is None
    assert lines[BAD]["grad_norm"] is None
    assert lines[BAD]["fault"] == "the loss is nan"
    sound = [step for step in range(6) if step != BAD]
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert [lines[s]["loss"] for s in sound] == pytest.approx([alone[s]["loss"] for s in sound], abs=tolerance)
    assert all(weight.isfinite().all() for weight in latest(tiny, f"bad-{stage}-{precision}").weights().values())
    assert [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in alone]


def test_a_skipped_step_is_no_update_of_adam_after_a_resume(tiny: Config, bad: dict[str, list[dict[str, Any]]]) -> None:
    assert losses(bad["bad-halves"]) == losses(bad["bad-straight"])
    assert_equal(tiny, "bad-halves", "bad-straight")


CALM = [2.0 + 0.1 * (i % 2) for i in range(8)]  # mean 2.05, standard deviation 0.05


@pytest.mark.parametrize(
    ("loss", "recent", "sigma", "fault"),
    [
        (2.2, CALM, 6.0, ""),
        (2.36, CALM, 6.0, "a spike"),
        (2.36, CALM, 7.0, ""),
        (2.36, CALM[1:], 6.0, ""),  # too few to judge by
        (0.1, CALM, 6.0, ""),  # downwards is no spike
        (99.0, CALM, None, ""),
        (math.nan, [], None, "the loss is nan"),
        (math.inf, CALM, 6.0, "the loss is inf"),
    ],
)
def test_what_is_wrong_with_a_loss(loss: float, recent: list[float], sigma: float | None, fault: str) -> None:
    train = TrainConfig(spike_sigma=sigma, spike_window=8)
    found = guards.check_loss(loss, recent, train)
    assert fault in found
    assert bool(fault) == bool(found)


@pytest.mark.parametrize(
    ("fault", "in_a_row", "rollbacks", "decision"),
    [
        ("", 0, 0, guards.AcceptStep()),
        ("", 3, 2, guards.AcceptStep()),
        ("f", 0, 0, guards.SkipStep("f")),
        ("f", 1, 2, guards.SkipStep("f")),
        ("f", 2, 0, guards.RollBack("f, after 2 in a row were skipped")),
        ("f", 2, 1, guards.StopRun("f, after 2 in a row were skipped and 1 roll-backs")),
    ],
)
def test_decisions(fault: str, in_a_row: int, rollbacks: int, decision: guards.Decision) -> None:
    state = TrainState(skipped_in_a_row=in_a_row, rollbacks=rollbacks)
    assert guards.decide(fault, state, TrainConfig(max_skipped=2, max_rollbacks=1)) == decision


def test_in_fp16_the_scale_may_fall_all_the_way() -> None:
    train = TrainConfig(max_skipped=2, max_rollbacks=0)
    assert guards.decide("f", TrainState(skipped_in_a_row=17, loss_scale=2.0**16), train) == guards.SkipStep("f")
    assert isinstance(guards.decide("f", TrainState(skipped_in_a_row=18, loss_scale=2.0**16), train), guards.StopRun)


def test_what_is_remembered() -> None:
    train = TrainConfig(spike_sigma=6.0, spike_window=3)
    assert guards.append_recent_loss((1.0, 2.0, 3.0), 4.0, train) == (2.0, 3.0, 4.0)
    assert guards.append_recent_loss((1.0,), 4.0, TrainConfig()) == ()


LEAP = (12, 13, 14)  # places in the data order whose batches are bad
STEPS = 24
JUMPY = {
    "train.max_steps": STEPS, "train.checkpoint_every": 4, "train.spike_sigma": 6.0, "train.spike_window": 6,
    "train.max_skipped": 2, "optim.lr": 2e-3, "schedule.total_steps": STEPS,
}  # fmt: skip
SAME = ("step", "loss", "grad_norm", "skipped", "rollbacks", "passed", "samples_hash", "tokens")


def spiked(rank: int, world: int, specs: str) -> None:
    """Run jobs whose loss is a hundredfold, and finite, in the batches at LEAP; what ends one is its `failed.txt`."""
    from engine.train import loop

    sound = loop.collate_rank_batches

    def collate_share(run: Any, ids: Any, draws: Any) -> Any:
        batches, seen = sound(run, ids, draws)
        factor = 100.0 if run.state.place in LEAP else 1.0
        return [(batch, weight * factor) for batch, weight in batches], seen

    loop.collate_rank_batches = collate_share
    for spec in json.loads(specs):
        try:
            work_on(rank, world, json.dumps([spec]))
        except UserError as error:
            (RunFolder(TrainJob.from_dict(spec).config.run_dir).logs / "failed.txt").write_text(str(error))


@pytest.fixture(scope="module")
def jumpy(tiny: Config) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of runs with three bad batches in a row, of which two may be skipped."""

    def some(name: str, world: int, stage: int, **changes: object) -> TrainJob:
        return make(
            tiny, f"jumpy-{name}", world, JUMPY | {"zero.stage": stage} | {f"train.{k}": v for k, v in changes.items()}
        )

    # The halves stop after one skipped step, then two steps after the roll-back, where no checkpoint is due.
    alone = [some(name, 1, stage) for name, stage in (("zero", 0), ("two", 2), ("three", 3))]
    alone += [some(f"halves-{stage}", 1, stage, max_steps=until) for stage in (0, 3) for until in (13, 14, STEPS)]
    alone += [some("end", 1, 1, max_rollbacks=0), some("lost", 1, 1, checkpoint_every=13)]
    return run(spiked, 1, alone) | run(spiked, 2, [some("two-1", 2, 1), some("two-3", 2, 3)])


def test_spikes_are_skipped_then_rolled_back_past_the_data(jumpy: dict[str, list[dict[str, Any]]]) -> None:
    # Steps 13 and 14 are skipped, the third bad one goes back to the checkpoint of step 12 and past places 12, 13, 14.
    lines = jumpy["jumpy-zero"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["passed"] for line in lines] == [0] * 12 + [3] * 12
    assert [line["rollbacks"] for line in lines] == [0] * 12 + [1] * 12
    assert {line["skipped"] for line in lines} == {0}
    assert lines[12]["rolled_back"].startswith("from step 15 back to step 12: the loss")
    assert all(line["loss"] < 10 for line in lines)


def test_the_data_passed_over_are_never_seen(tiny: Config, jumpy: dict[str, list[dict[str, Any]]]) -> None:
    blocks = Blocks(Split.open(prepare(tiny), "train"), tiny.data.sequence_length)
    order = DataOrder(len(blocks), tiny.train.global_batch, tiny.seed)
    places = [place for place in range(STEPS + 3) if place not in LEAP]
    assert jumpy["jumpy-zero"][-1]["samples_hash"] == hash_hex(add_hashes(ids_hash(order.sample_ids(p)) for p in places))


@pytest.mark.parametrize("name", ["two", "three", "two-1", "two-3"])
def test_a_roll_back_is_the_same_in_any_layout(jumpy: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert losses(jumpy[f"jumpy-{name}"]) == pytest.approx(losses(jumpy["jumpy-zero"]), abs=1e-5)
    assert [line["samples_hash"] for line in jumpy[f"jumpy-{name}"]] == [
        line["samples_hash"] for line in jumpy["jumpy-zero"]
    ]


@pytest.mark.parametrize(("stage", "whole"), [(0, "zero"), (3, "three")])
def test_a_resume_around_a_roll_back_is_bit_equal(
    tiny: Config, jumpy: dict[str, list[dict[str, Any]]], stage: int, whole: str
) -> None:
    for line, other in zip(jumpy[f"jumpy-halves-{stage}"], jumpy[f"jumpy-{whole}"], strict=True):
        assert {name: line[name] for name in SAME} == {name: other[name] for name in SAME}
    assert_equal(tiny, f"jumpy-halves-{stage}", f"jumpy-{whole}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "end",
            r"step 15: the loss .* is a spike: more than 6 x .*, after 2 in a row were skipped: use a lower optim.lr",
        ),
        ("lost", r"and there is no good checkpoint to go back to"),
    ],
)
def test_the_end_comes_with_a_reason(
    tiny: Config, jumpy: dict[str, list[dict[str, Any]]], name: str, said: str
) -> None:
    assert re.search(said, (Path(tiny.runs_dir) / f"jumpy-{name}" / "logs" / "failed.txt").read_text())

"""The loss curve is a function of the config, not of the cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.config import Config, with_values
from engine.data.order import add_hashes, hash_hex, ids_hash
from engine.data.packing import Blocks
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.worker import Job
from tests.engine.train.ranks import losses, run_ranks

ONE_RANK = [("stage0", {"zero.stage": 0}), ("stage3", {"zero.stage": 3, "train.micro_batch": 8})]
TWO_RANKS = [
    ("two1", {"zero.stage": 1, "train.micro_batch": 4}),
    ("two2", {"zero.stage": 2, "train.micro_batch": 1}),
    ("two3", {"zero.stage": 3}),
]
THREE_RANKS = [("three0", {"zero.stage": 0, "train.micro_batch": 3}), ("three2", {"zero.stage": 2})]


def job(config: Config, name: str, changes: dict[str, object], workers: int) -> Job:
    changed = with_values(config, {"name": name, "train.workers": workers, **changes})
    return Job(changed, prepare(config))


@pytest.fixture(scope="module")
def curves(tiny: Config) -> dict[str, list[dict[str, object]]]:
    found = {}
    for world, layouts in ((1, ONE_RANK), (2, TWO_RANKS), (3, THREE_RANKS)):
        jobs = [job(tiny, name, changes, world) for name, changes in layouts]
        found.update(zip([name for name, _ in layouts], run_ranks(jobs, world), strict=True))
    return found


@pytest.mark.parametrize("name", [name for name, _ in [*ONE_RANK, *TWO_RANKS, *THREE_RANKS]][1:])
def test_every_layout_gives_the_same_curve(curves: dict[str, list[dict[str, object]]], name: str) -> None:
    assert len(curves[name]) == 6
    assert losses(curves[name]) == pytest.approx(losses(curves["stage0"]), abs=1e-5)
    assert [line["grad_norm"] for line in curves[name]] == pytest.approx(
        [line["grad_norm"] for line in curves["stage0"]], rel=1e-4
    )
    assert [line["samples_hash"] for line in curves[name]] == [line["samples_hash"] for line in curves["stage0"]]
    assert curves[name][-1]["validation_loss"] == pytest.approx(curves["stage0"][-1]["validation_loss"], abs=1e-5)


def test_an_epoch_sees_each_sample_once(curves: dict[str, list[dict[str, object]]], tiny: Config) -> None:
    from engine.data.order import Order

    size = len(Blocks(Split.open(prepare(tiny), "train"), 32))
    order = Order(size, 8, tiny.seed)
    seen = [i for step in range(size // 8) for i in order.samples(step)]
    assert len(set(seen)) == len(seen) == size // 8 * 8
    first = add_hashes(ids_hash(order.samples(step)) for step in range(6))
    assert curves["two2"][-1]["samples_hash"] == hash_hex(first)


def test_resume_goes_through_stages_and_worker_counts(curves: dict[str, list[dict[str, object]]], tiny: Config) -> None:
    data = prepare(tiny)
    lines = []
    for until, stage, workers in ((2, 1, 2), (4, 3, 1), (6, 0, 2)):
        changed = with_values(
            tiny,
            {
                "name": "travels",
                "train.workers": workers,
                "zero.stage": stage,
                "train.max_steps": until,
                "schedule.total_steps": 6,
            },
        )
        (lines,) = run_ranks([Job(changed, data)], workers)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert losses(lines) == pytest.approx(losses(curves["stage0"]), abs=1e-5)


def test_stopping_and_going_on_is_bit_for_bit_the_straight_run(tiny: Config) -> None:
    data = prepare(tiny)
    straight = with_values(tiny, {"name": "straight", "zero.stage": 2})
    halves = [
        with_values(tiny, {"name": "halves", "zero.stage": 2, "train.max_steps": until, "schedule.total_steps": 6})
        for until in (3, 6)
    ]
    results = run_ranks([Job(config, data) for config in (straight, *halves)], 1)
    assert losses(results[0]) == losses(results[2])
    ours, theirs = (
        Checkpoint(step_folders(Path(tiny.runs_dir) / name / "checkpoints")[0]) for name in ("straight", "halves")
    )
    assert ours.state == theirs.state == dataclasses.replace(ours.state, step=6)
    for name, weight in ours.weights().items():
        assert torch.equal(weight, theirs.weights()[name]), name


def test_what_is_masked_does_not_depend_on_the_layout(tiny: Config) -> None:
    masked = with_values(
        tiny, {"model.type": "bert", "model.num_key_value_heads": None, "objective.name": "masked_lm", "zero.stage": 0}
    )
    (alone,) = run_ranks([job(masked, "masked-alone", {"train.micro_batch": 8}, 1)], 1)
    (two,) = run_ranks([job(masked, "masked-two", {"zero.stage": 2, "train.micro_batch": 3}, 2)], 2)
    assert len(alone) == 6
    assert losses(two) == pytest.approx(losses(alone), abs=1e-5)
    assert two[-1]["validation_loss"] == pytest.approx(alone[-1]["validation_loss"], abs=1e-5)

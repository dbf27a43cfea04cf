"""The loss curve is a function of the config, not of the cluster."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, with_values
from engine.data.order import add_hashes, hash_hex, ids_hash
from engine.data.packing import Blocks
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from tests.engine.train.ranks import losses, run_ranks

STEPS = 30
LONG = {
    "train.max_steps": STEPS,
    "optim.lr": 2e-3,
    "train.checkpoint_every": STEPS,
}  # at 1e-2 rounding differences exceed 1e-5
RAGGED = {  # short documents, not split to fill samples: samples, and so ranks, have different token counts
    "data.source": "files", "data.name": "ragged", "data.packing": "best_fit", "data.max_documents": None,
}  # fmt: skip
LAYOUTS: dict[int, list[tuple[str, dict[str, object]]]] = {  # by the number of ranks
    1: [("stage0", {"zero.stage": 0}), ("stage3", {"zero.stage": 3, "train.micro_batch": 8}),
        ("ragged", {"zero.stage": 0, **RAGGED})],
    2: [("two1", {"zero.stage": 1, "train.micro_batch": 4}), ("two2", {"zero.stage": 2, "train.micro_batch": 1}),
        ("two3", {"zero.stage": 3})],
    3: [("three0", {"zero.stage": 0, "train.micro_batch": 3}), ("three2", {"zero.stage": 2}),
        ("ragged3", {"zero.stage": 3, "train.micro_batch": 1, **RAGGED})],
    4: [("four1", {"zero.stage": 1, "train.micro_batch": 1}), ("four3", {"zero.stage": 3}),
        ("ragged4", {"zero.stage": 2, **RAGGED})],
}  # fmt: skip
NAMES = [name for layouts in LAYOUTS.values() for name, _ in layouts if name not in ("stage0", "ragged")]


def job(config: Config, name: str, changes: dict[str, object], workers: int) -> TrainJob:
    changed = with_values(config, {"name": name, "train.workers": workers, **changes})
    return TrainJob(changed, prepare(changed))


@pytest.fixture(scope="module")
def curves(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    curves, rng, texts = {}, random.Random(0), tmp_path_factory.mktemp("texts") / "short.jsonl"
    words = Path(random.__file__).read_text().split()
    documents = [" ".join(rng.sample(words, rng.randint(3, 12))) for _ in range(800)]
    texts.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    tiny = with_values(tiny, {"data.path": str(texts)})
    for world_size, layouts in LAYOUTS.items():
        jobs = [job(tiny, name, LONG | changes, world_size) for name, changes in layouts]
        curves.update(zip([name for name, _ in layouts], run_ranks(jobs, world_size), strict=True))
    return curves


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_curve(curves: dict[str, list[dict[str, Any]]], name: str) -> None:
    lines, expected = curves[name], curves["ragged" if "ragged" in name else "stage0"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert losses(lines) == pytest.approx(losses(expected), abs=1e-5)
    norms = [line["grad_norm"] for line in expected]
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    for key in ("samples_hash", "tokens"):
        assert [line[key] for line in lines] == [line[key] for line in expected]
    assert lines[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], abs=1e-5)


def test_ragged_samples_have_unequal_counts(curves: dict[str, list[dict[str, Any]]]) -> None:
    tokens = [line["tokens"] for line in curves["ragged"]]
    assert len({after - before for before, after in pairwise(tokens)}) > 3
    assert [line["tokens"] for line in curves["stage0"]] == [256 * step for step in range(1, STEPS + 1)]


def test_an_epoch_sees_each_sample_once(curves: dict[str, list[dict[str, Any]]], tiny: Config) -> None:
    from engine.data.order import DataOrder

    size = len(Blocks(Split.open(prepare(tiny), "train"), 32))
    order = DataOrder(size, 8, tiny.seed)
    seen = [i for step in range(size // 8) for i in order.sample_ids(step)]
    assert len(set(seen)) == len(seen) == size // 8 * 8
    first = add_hashes(ids_hash(order.sample_ids(step)) for step in range(STEPS))
    assert curves["two2"][-1]["samples_hash"] == hash_hex(first)


def run_in_parts(tiny: Config, name: str, parts: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Run in parts (last step, ZeRO stage, ranks), each resuming the one before; return all lines."""
    for until, stage, workers in parts:
        changes = {"zero.stage": stage, "train.max_steps": until, "schedule.total_steps": STEPS}
        (lines,) = run_ranks([job(tiny, name, LONG | changes, workers)], workers)
    return lines


def test_resuming_with_other_stages_and_worker_counts(curves: dict[str, list[dict[str, Any]]], tiny: Config) -> None:
    lines = run_in_parts(tiny, "in-parts", [(2, 1, 2), (4, 3, 1), (6, 0, 2)])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert losses(lines) == pytest.approx(losses(curves["stage0"])[:6], abs=1e-5)


@pytest.mark.slow
def test_resuming_with_all_stages_and_worker_counts_twice(
    curves: dict[str, list[dict[str, Any]]], tiny: Config
) -> None:
    parts = zip(range(4, STEPS + 1, 4), (1, 3, 2, 0) * 2, (2, 4, 1) * 3, strict=False)
    lines = run_in_parts(tiny, "in-many-parts", list(parts))
    assert len(lines) == 28
    assert losses(lines) == pytest.approx(losses(curves["stage0"])[:28], abs=1e-5)
    assert lines[-1]["samples_hash"] == curves["stage0"][27]["samples_hash"]


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tiny: Config) -> None:
    data = prepare(tiny)
    straight = with_values(tiny, {"name": "straight", "zero.stage": 2})
    halves = [
        with_values(tiny, {"name": "halves", "zero.stage": 2, "train.max_steps": until, "schedule.total_steps": 6})
        for until in (3, 6)
    ]
    results = run_ranks([TrainJob(config, data) for config in (straight, *halves)], 1)
    assert losses(results[0]) == losses(results[2])
    actual, expected = (
        Checkpoint(step_folders(Path(tiny.runs_dir) / name / "checkpoints")[0]) for name in ("straight", "halves")
    )
    assert actual.state == expected.state == dataclasses.replace(actual.state, step=6)
    for name, weight in actual.weights().items():
        assert torch.equal(weight, expected.weights()[name]), name


def test_masking_does_not_depend_on_the_layout(tiny: Config) -> None:
    masked = with_values(
        tiny, {"model.type": "bert", "model.num_key_value_heads": None, "objective.name": "masked_lm", "zero.stage": 0}
    )
    (alone,) = run_ranks([job(masked, "masked-alone", {"train.micro_batch": 8}, 1)], 1)
    (two,) = run_ranks([job(masked, "masked-two", {"zero.stage": 2, "train.micro_batch": 3}, 2)], 2)
    assert len(alone) == 6
    assert losses(two) == pytest.approx(losses(alone), abs=1e-5)
    assert two[-1]["validation_loss"] == pytest.approx(alone[-1]["validation_loss"], abs=1e-5)

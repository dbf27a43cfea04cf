"""Packed documents of several sources: the same curve in every layout, each virtual sample once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import Config, with_values
from engine.data.order import DataOrder, add_hashes, hash_hex, ids_hash
from engine.data.packing import Mix, Packing, pack
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.train.job import TrainJob
from engine.train.launch import check_job
from tests.engine.train.ranks import losses, run_ranks


@pytest.fixture
def mixed(tiny: Config, tmp_path: Path) -> Config:
    """Return a config with a few dozen samples of two sources, so that six steps of eight samples exceed an epoch."""
    rows = {
        "facts": [f"{i} and {i + 1} are {2 * i + 1}; " * (1 + i % 5) for i in range(60)],
        "tales": [f"The fox number {i} went out of the wood. " * (1 + i % 3) for i in range(40)],
    }
    for name, texts in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return with_values(
        tiny,
        {
            "data.source": "files", "data.max_documents": None, "data.vocab_size": 400, "data.sequence_length": 64,
            "data.packing": "best_fit", "data.within_documents": True, "runs_dir": str(tmp_path / "runs"),
            "data.sources": {
                "facts": {"path": str(tmp_path / "facts.jsonl"), "weight": 0.5},
                "tales": {"path": str(tmp_path / "tales.jsonl"), "weight": 2},
            },
        },
    )  # fmt: skip


def test_a_mix_of_packed_documents_has_the_same_curve_in_every_layout(mixed: Config) -> None:
    data = prepare(mixed)
    samples = pack(Split.open(data, "train"), 64, Packing.from_config(mixed.data), overlap=1)
    assert isinstance(samples, Mix)
    assert len(samples) < 6 * 8 < 4 * len(samples)
    check_job(TrainJob(mixed, data))

    def job(name: str, workers: int, stage: int, until: int = 6) -> TrainJob:
        changes = {"name": name, "train.workers": workers, "zero.stage": stage, "train.max_steps": until}
        return TrainJob(with_values(mixed, changes | {"schedule.total_steps": 6, "train.micro_batch": 3}), data)

    run_ranks([job("moved", 2, 2, until=3)], 2)
    alone, moved = run_ranks([job("alone", 1, 0), job("moved", 1, 3)], 1)
    assert losses(moved) == pytest.approx(losses(alone), abs=1e-5)
    assert moved[-1]["validation_loss"] == pytest.approx(alone[-1]["validation_loss"], abs=1e-5)
    order = DataOrder(len(samples), 8, mixed.seed, endless=True)
    expected_hash = add_hashes(ids_hash(order.sample_ids(step)) for step in range(6))
    assert alone[-1]["samples_hash"] == moved[-1]["samples_hash"] == hash_hex(expected_hash)
    assert alone[-1]["padding"] == samples.padding
    tokens = sum(len(samples[i]["tokens"]) - 1 for step in range(6) for i in order.sample_ids(step))
    assert alone[-1]["tokens"] == tokens


def test_an_unsupported_architecture_is_refused_before_training(mixed: Config) -> None:
    changes = {"model.type": "opt", "model.num_key_value_heads": None, "model.intermediate_size": None}
    with pytest.raises(UserError, match=r"within_documents is not for model\.type=opt"):
        check_job(TrainJob(with_values(mixed, changes), prepare(mixed)))

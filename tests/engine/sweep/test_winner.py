"""A model soup of LoRA trials averages their merged weights, whatever their ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.sweep.winner import SoupEvaluator, Winner
from engine.train.job import TrainJob
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.train.ranks import run_here


def test_a_soup_averages_merged_weights(tiny: Config, tmp_path: Path) -> None:
    base = fresh_bundle(tiny, tmp_path / "base" / "bundle").folder
    tuned = with_values(tiny, {"job": "finetune", "bundle": str(base), "runs_dir": str(tmp_path), "train.max_steps": 2})
    jobs = [
        TrainJob(with_values(tuned, {"name": f"rank{rank}", "objective.lora.rank": rank}), prepare(tiny), base)
        for rank in (2, 4)
    ]
    winners = [Winner(job, lines[-1]) for job, lines in zip(jobs, run_here(jobs), strict=True)]
    evaluator = SoupEvaluator(winners[0])
    for winner in winners:
        model: Any = Bundle.open(winner.job.config.run_dir / "bundle").model()
        weights = evaluator.load_weights(winner)
        assert list(weights) == [name for name, _ in model.named_parameters()]
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
        loss = evaluator.evaluate(weights)["loss"]
        assert loss == pytest.approx(winner.line["validation_loss"], abs=1e-4)

"""The step logger of a training worker, and the training record of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import Config, with_values
from engine.train import worker
from engine.train.job import TrainJob
from engine.train.meter import StepMeter
from engine.train.process_group import ProcessGroup
from engine.train.run_folder import RunFolder
from engine.train.worker import StepLogger, training_summary

CPU = torch.device("cpu")


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_writes_each_step_with_constants_and_energy(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    energy = SimpleNamespace(lap=lambda: {"energy_estimated_j": 2.0})
    monkeypatch.setattr(worker, "EnergyMeter", lambda device, world_size: energy)
    lines: list[dict[str, Any]] = []
    run, group = RunFolder(tmp_path), ProcessGroup(rank, 2, CPU)
    with StepLogger(run, tiny, group, StepMeter(CPU, 1.0, 1.0), 0, {"padding": 0.25}, lines.append) as log:
        log({"step": 1, "loss": 2.0})
    expected = {"step": 1, "loss": 2.0, "padding": 0.25} | ({"energy_estimated_j": 2.0} if rank == 0 else {})
    assert log.last_metrics == expected
    assert lines == [expected]
    assert list(run.metrics()) == ([expected] if rank == 0 else [])


def test_a_training_summary_ends_at_the_step_of_the_bundle(tiny: Config, tmp_path: Path) -> None:
    config = with_values(tiny, {"runs_dir": str(tmp_path), "name": "run"})
    config.run_dir.mkdir()
    lines = [{"step": step, "tokens": 256 * step, "energy_estimated_j": 1.0} for step in (1, 2, 3)]
    RunFolder(config.run_dir).metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = training_summary(TrainJob(config, Path("data")), lines[1])
    assert (summary["tokens"], summary["energy"]["estimated_j"]) == (512, 2.0)
    assert summary["config"]["optim.lr"] == config.optim.lr

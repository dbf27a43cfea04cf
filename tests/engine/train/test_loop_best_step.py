"""The best step of a run: its checkpoint is kept and exported, and a run that does not improve ends early."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train.checkpoint import Checkpoint, step_folder, step_folders
from engine.train.job import TrainJob
from tests.engine.train.ranks import run_ranks

HIGH_LR = {  # a learning rate at which the validation loss soon rises
    "optim.lr": 0.3, "schedule.kind": "constant", "schedule.warmup_steps": 0, "train.max_steps": 60,
    "train.evaluate_every": 1, "train.keep_checkpoints": 1, "train.keep_best": True, "train.patience": 3,
}  # fmt: skip


def test_the_bundle_is_of_the_best_step_and_the_run_ends_early(tiny: Config) -> None:
    config = with_values(tiny, HIGH_LR | {"name": "high-lr", "zero.stage": 1, "train.workers": 2})
    (lines,) = run_ranks([TrainJob(config, prepare(config))], 2)
    values = [line["validation_loss"] for line in lines]
    best = 1 + values.index(min(values))
    assert len(lines) == best + 3 < 60
    checkpoints = config.run_dir / "checkpoints"
    assert step_folders(checkpoints) == [step_folder(checkpoints, best + 3), step_folder(checkpoints, best)]
    state = Checkpoint(step_folder(checkpoints, best + 3)).state
    assert (state.best, state.best_step, state.evals_since_best) == (min(values), best, 3)
    weights = Checkpoint(step_folder(checkpoints, best)).weights()
    for name, tensor in load_file(config.run_dir / "bundle" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    manifest = json.loads((config.run_dir / "bundle" / "manta.json").read_text())
    assert manifest["run"]["step"] == best
    assert manifest["evaluation"]["validation_loss"] == min(values)


def test_patience_needs_validations(tiny: Config) -> None:
    with pytest.raises(UserError, match=r"set their interval with train\.evaluate_every"):
        with_values(tiny, {"train.patience": 2})

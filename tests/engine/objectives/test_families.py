"""What holds for each family alike: one curve in every layout, an exact resume, a bundle that answers as recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.train.checkpoint import Checkpoint, step_folders
from tests.engine.objectives.conftest import FAMILIES, LAYOUTS, Curves
from tests.engine.train.ranks import losses


@pytest.mark.parametrize("task", FAMILIES)
def test_the_curve_is_the_same_in_every_layout(task: str, curves: Curves) -> None:
    alone = curves[task, "alone"]
    assert len(alone) == 6
    assert losses(alone)[-1] < losses(alone)[0]
    for name in LAYOUTS:
        lines = curves[task, name]
        assert losses(lines) == pytest.approx(losses(alone), abs=1e-5), name
        assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-4)
        assert [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in alone]
        assert lines[-1]["validation_loss"] == pytest.approx(alone[-1]["validation_loss"], abs=1e-5)


@pytest.mark.parametrize("task", FAMILIES)
def test_resuming_is_bit_for_bit_the_straight_run(task: str, curves: Curves, runs_dir: Path) -> None:
    assert losses(curves[task, "half 6"]) == losses(curves[task, "alone"])
    ours, theirs = (
        Checkpoint(step_folders(runs_dir / f"{task}-{name}" / "checkpoints")[0]).weights()
        for name in ("alone", "halves")
    )
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("task", FAMILIES)
def test_the_bundle_is_whole_and_answers_as_recorded(task: str, curves: Curves, runs_dir: Path) -> None:
    bundle = Bundle.open(runs_dir / f"{task}-two" / "bundle")
    bundle.verify()
    assert bundle.manifest
    assert bundle.manifest.golden
    bundle.replay(bundle.model())

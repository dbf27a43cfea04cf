"""Tests of every family: the same curve in every layout, an exact resume, a bundle with golden outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.train.checkpoint import Checkpoint, step_folders
from tests.engine.objectives.conftest import FAMILIES, LAYOUTS, Curves
from tests.engine.train.ranks import losses


@pytest.mark.parametrize("task", FAMILIES)
def test_loss_curve_is_the_same_in_every_layout(task: str, curves: Curves) -> None:
    reference = curves[task, "one"]
    assert len(reference) == 6
    assert losses(reference)[-1] < losses(reference)[0]
    for name in LAYOUTS:
        lines = curves[task, name]
        assert losses(lines) == pytest.approx(losses(reference), abs=1e-5), name
        assert [line["grad_norm"] for line in lines] == pytest.approx(
            [line["grad_norm"] for line in reference], rel=1e-4
        )
        assert [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in reference]
        assert lines[-1]["validation_loss"] == pytest.approx(reference[-1]["validation_loss"], abs=1e-5)


@pytest.mark.parametrize("task", FAMILIES)
def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(task: str, curves: Curves, runs_dir: Path) -> None:
    assert losses(curves[task, "until 6"]) == losses(curves[task, "one"])
    uninterrupted, resumed = (
        Checkpoint(step_folders(runs_dir / f"{task}-{name}" / "checkpoints")[0]).weights()
        for name in ("one", "resumed")
    )
    assert uninterrupted.keys() == resumed.keys()
    for name, weight in uninterrupted.items():
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.parametrize("task", FAMILIES)
def test_bundle_verifies_and_reproduces_its_golden_outputs(task: str, curves: Curves, runs_dir: Path) -> None:
    bundle = Bundle.open(runs_dir / f"{task}-two" / "bundle")
    bundle.verify()
    assert bundle.manifest
    assert bundle.manifest.golden
    bundle.replay(bundle.model())

"""Each family learns from real data with one command, and its bundle is evaluated with another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.objectives.conftest import SHARED

ROOT = Path(__file__).parents[3]
IMAGES = [
    "data.path={shared}/images/train.parquet",
    "data.test_path={shared}/images/test.parquet",
    "data.label_column=label_name",
]
TEXT = ["data=files", "data.path={shared}/text/tinyshakespeare.txt", "data.vocab_size=1024", "data.sequence_length=128"]


def run_manta(folder: Path, *args: str) -> str:
    process = subprocess.run(
        [sys.executable, "-m", "jobs.manta", *(arg.format(shared=SHARED) for arg in args)],
        cwd=folder, capture_output=True, text=True, timeout=580,
        env={**os.environ, "MANTA_HOME": str(folder / "home"), "COLUMNS": "120", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return process.stdout


def pretrain(folder: Path, name: str, *options: str) -> list[dict[str, Any]]:
    if not SHARED.exists():
        pytest.skip("the real data (../shared/data) is not next to this checkout")
    run_manta(folder, "pretrain", f"experiment={name}", *options, "train.workers=2", "tracking.enabled=false")
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_vit_classifies_cifar(tmp_path: Path) -> None:
    lines = pretrain(tmp_path, "vit", *IMAGES, "train.max_steps=100")
    assert lines[-1]["validation_accuracy"] > 0.2  # chance: 0.1
    output = run_manta(tmp_path, "evaluate", "bundle=vit", "data=images", *IMAGES, "evaluate.resamples=200")
    assert float(re.findall(r"accuracy\W+([0-9.]+)", output)[0]) > 0.2


@pytest.mark.slow
def test_clip_retrieves_captions_of_cifar(tmp_path: Path) -> None:
    caption = "data.caption=a photo of a {{label}}"
    lines = pretrain(tmp_path, "clip", *IMAGES, caption, "train.max_steps=100")
    assert lines[-1]["validation_accuracy"] > 0.17  # chance: 0.1
    assert lines[-1]["loss"] < 4.0 < lines[0]["loss"]  # a batch of 64 by chance: 4.16
    output = run_manta(tmp_path, "evaluate", "bundle=clip", "data=images", *IMAGES, caption, "evaluate.resamples=200")
    assert float(re.findall(r"accuracy\W+([0-9.]+)", output)[0]) > 0.17


@pytest.mark.slow
def test_dit_learns_cifar_and_its_images_are_evaluated(tmp_path: Path) -> None:
    lines = pretrain(tmp_path, "dit", *IMAGES, "train.max_steps=150", "train.ema=0.98")
    assert lines[-1]["validation_loss"] < 0.2 < lines[0]["loss"]  # predicting zero noise: 1
    output = run_manta(
        tmp_path, "evaluate", "bundle=dit", "data=images", *IMAGES, "evaluate.resamples=100", "evaluate.images=100"
    )
    assert "features of a random convolution" in " ".join(output.split())
    images = json.loads((tmp_path / "runs" / "evaluate" / "evaluation.json").read_text())["bundles"][0]["images"]
    generated, real, noise = (
        images["metrics"][f"frechet_distance{of}"]["value"] for of in ("", "_of_real", "_of_noise")
    )
    assert real < min(generated, noise)


@pytest.mark.slow
def test_t5_learns_shakespeare(tmp_path: Path) -> None:
    lines = pretrain(tmp_path, "t5", *TEXT, "train.max_steps=100")
    assert lines[-1]["validation_loss"] < 5.6 < lines[0]["loss"]
    output = run_manta(
        tmp_path, "evaluate", "bundle=t5", *TEXT, "evaluate.resamples=200",
    )  # fmt: skip
    assert "perplexity" in output


@pytest.mark.slow
def test_whisper_transcribes_spoken_digits(tmp_path: Path) -> None:
    speech = [
        "data.path={shared}/audio/train.parquet",
        "data.test_path={shared}/audio/test.parquet",
        "data.text_column=label",
    ]
    lines = pretrain(tmp_path, "whisper", *speech, "data.audio_seconds=2", "train.max_steps=500")
    assert lines[-1]["validation_wer"] < 0.75  # chance: 0.9
    output = run_manta(tmp_path, "evaluate", "bundle=whisper", "data=speech", *speech, "evaluate.resamples=200")
    assert float(re.findall(r"wer\W+([0-9.]+)", output)[0]) < 0.75

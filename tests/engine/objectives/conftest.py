"""Small models of each family on small data: synthetic images, synthetic speech, and the standard library's source."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from engine.config import Config, with_values
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.processor import load_prepared_processor
from engine.models.build import build_model
from engine.objectives.contract import Objective, objective_class
from engine.train.job import TrainJob
from tests.engine.data.audio_samples import hummed_table
from tests.engine.train.ranks import run_ranks

COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
SHARED = Path(__file__).parents[4] / "shared" / "data"
NO_TEXT_FIELDS = {
    "model.num_key_value_heads": None,
    "model.max_position_embeddings": None,
    "model.tie_word_embeddings": None,
}
NO_SIZE_FIELDS = {
    f"model.{name}": None for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 8}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
FAMILIES = {
    "span_corruption": {
        "model.type": "t5", **NO_TEXT_FIELDS, "model.intermediate_size": None, "data.sentinel_tokens": 20,
        "model.options": {"d_kv": 8, "d_ff": 64, "feed_forward_proj": "gated-gelu"},
    },
    "image_classification": {"model.type": "vit", **NO_TEXT_FIELDS, "model.options": {"patch_size": 8}},
    "diffusion": {
        "model.type": "dit", **NO_TEXT_FIELDS, "model.intermediate_size": None, "model.options": {"patch_size": 4},
        "objective.sampling_steps": 4,
    },
    "contrastive": {
        "model.type": "clip", **NO_TEXT_FIELDS, **NO_SIZE_FIELDS, "data.caption": "a {label} picture, {words}", "data.sequence_length": 12,
        "model.options": {"projection_dim": 16, "vision_config": VISION, "text_config": TEXT},
    },
    "speech_recognition": {
        "model.type": "whisper", **NO_TEXT_FIELDS, "model.intermediate_size": None, "data.sequence_length": 6,
        "model.options": {
            "decoder_layers": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_target_positions": 16,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a table of 96 images in three colors, each with a caption, and three faulty rows."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        name = list(COLORS)[i % 3]
        canvas = rng.integers(0, 60, (20, 24, 3)) + np.array(COLORS[name]) // (1 + i % 2)
        file = io.BytesIO()
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "colour": name, "words": f"number {i % 7}"})
    rows[3]["image"] = {"bytes": b"no image at all", "path": None}
    rows[4]["image"] = {"bytes": None, "path": "gone.png"}
    rows[5]["colour"] = None
    path = tmp_path_factory.mktemp("painted") / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="session")
def hummed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a table of 96 synthetic utterances of one to three words, five of them faulty."""
    return hummed_table(tmp_path_factory.mktemp("hummed") / "train.parquet", 96)


@pytest.fixture(scope="session")
def family(tiny: Config, painted: Path, hummed: Path) -> Callable[..., Config]:
    """Return a function from an objective's name and other options to a config with a model of about 30,000 parameters."""
    images = {
        "data.source": "files", "data.path": str(painted), "data.image_column": "image", "data.label_column": "colour",
        "data.image_size": 16, "data.name": "painted", "data.max_documents": None, "data.validation_fraction": 0.2,
        "data.test_fraction": 0.2,
    }  # fmt: skip

    speech = {
        "data.source": "files", "data.path": str(hummed), "data.audio_column": "audio", "data.text_column": "words",
        "data.audio_seconds": 1, "data.name": "hummed", "data.max_documents": None, "data.validation_fraction": 0.2,
        "data.test_fraction": 0.2,
    }  # fmt: skip
    data_options: dict[str, dict[str, Any]] = {"span_corruption": {}, "speech_recognition": speech}

    def make_config(task: str, **changes: Any) -> Config:
        values = {"objective.name": task, **FAMILIES[task], **data_options.get(task, images)}
        return with_values(tiny, values | {key.replace("__", "."): value for key, value in changes.items()})

    return make_config


def build_task(config: Config) -> tuple[Objective, torch.nn.Module, Path]:
    """Return the objective, a model and the prepared data of a config."""
    data = prepare(config)
    objective = objective_class(config.objective.name)(
        config.objective, load_prepared_processor(data), config.data.sequence_length, Manifest.load(data).labels
    )
    model = build_model(config.model, objective.processor, objective.auto_class, objective.model_options(), seed=1)
    objective.bind_model(model.config)
    return objective, model, data


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of each weight."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest distance between two gradients of a weight, relative to the norm of all gradients."""
    assert ours.keys() == theirs.keys()
    norm = torch.cat([g.flatten() for g in theirs.values()]).norm()
    return max(float((ours[name] - theirs[name]).norm() / norm) for name in theirs)


Curves = dict[tuple[str, str], list[dict[str, Any]]]
LAYOUTS = {  # name -> workers, ZeRO stage, micro-batch
    "one": (1, 2, 7), "two": (2, 2, 2), "sharded": (2, 3, 3),
}  # fmt: skip


@pytest.fixture(scope="session")
def curves(family: Callable[..., Config]) -> Curves:
    """Train each family in each layout, and once with a resume; a global batch of 7 leaves one rank with fewer samples."""

    def job(task: str, name: str, stage: int, micro: int, **changes: Any) -> TrainJob:
        layout = {"zero__stage": stage, "train__micro_batch": micro, "train__global_batch": 7}
        config = family(task, name=f"{task}-{name}", **layout, **changes)
        return TrainJob(config, prepare(config))

    all_curves: Curves = {}
    for world in (1, 2):
        jobs = {
            (task, name): job(task, name, stage, micro, train__workers=workers)
            for task in FAMILIES
            for name, (workers, stage, micro) in LAYOUTS.items()
            if workers == world
        }
        if world == 1:
            for until in (3, 6):
                for task in FAMILIES:
                    changes = {"train__max_steps": until, "schedule__total_steps": 6}
                    jobs[task, f"until {until}"] = job(task, "resumed", 2, 7, **changes)
        all_curves |= dict(zip(jobs, run_ranks(list(jobs.values()), world), strict=True))
    return all_curves

"""Small bundles with fresh weights."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.bundles.bundle import Bundle, write_bundle
from engine.config import Config
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.processor import prepared_processor
from engine.data.shards import Split
from engine.models.build import build
from engine.objectives.contract import objective_class


def fresh_bundle(config: Config, folder: Path, seed: int = 0) -> Bundle:
    """Write a bundle of the config's model with fresh weights, large enough for its answers to differ."""
    data = prepare(config)
    manifest = Manifest.load(data)
    processor = prepared_processor(data)
    objective = objective_class(config.objective.name)(
        config.objective, processor, config.data.sequence_length, manifest.labels
    )
    model = build(config.model, processor, objective.auto_class, objective.model_options(), seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return write_bundle(
        folder, model=model, objective=objective, name=folder.parent.name,
        golden_requests=objective.golden_requests(Split.open(data, "validation")), data={"folder": str(data), "hash": manifest.hash},
    )  # fmt: skip

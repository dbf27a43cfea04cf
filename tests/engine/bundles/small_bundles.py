"""Small bundles, with random weights or trained for a few steps."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.bundles.bundle import Bundle, BundleInfo, write_bundle
from engine.config import Config
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.processor import load_prepared_processor
from engine.data.shards import Split
from engine.models.build import build_model
from engine.objectives.contract import Objective, objective_class


def fresh_bundle(config: Config, folder: Path, seed: int = 0, scale: float = 8) -> Bundle:
    """Write a bundle of the config's model with random weights times `scale`: large enough for its outputs to differ."""
    objective, model = objective_and_model(config, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return write_small_bundle(config, objective, model, folder)


def trained_bundle(config: Config, folder: Path, steps: int) -> Bundle:
    """Write a bundle of the config's model after `steps` plain AdamW steps with batches of 16."""
    objective, model = objective_and_model(config, 1)
    samples = objective.samples(Split.open(prepare(config), "train"))
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrix products this small take longer on several
    for _ in range(steps):
        chosen = torch.randint(len(samples), (16,), generator=generator).tolist()
        loss = objective.loss(model, objective.collate([samples[i] for i in chosen]))
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return write_small_bundle(config, objective, model, folder)


def objective_and_model(config: Config, seed: int) -> tuple[Objective, torch.nn.Module]:
    """Return the objective on the config's data, and a model with random weights."""
    data = prepare(config)
    processor, labels = load_prepared_processor(data), Manifest.load(data).labels
    objective = objective_class(config.objective.name)(config.objective, processor, config.data.sequence_length, labels)
    return objective, build_model(config.model, processor, objective.auto_class, objective.model_options(), seed)


def write_small_bundle(config: Config, objective: Objective, model: torch.nn.Module, folder: Path) -> Bundle:
    """Write a bundle of a model for the config's data."""
    data = prepare(config)
    golden = objective.golden_requests(Split.open(data, "validation"))
    origin = {"folder": str(data), "hash": Manifest.load(data).hash}
    return write_bundle(folder, model, objective, BundleInfo(folder.parent.name, golden, data=origin))

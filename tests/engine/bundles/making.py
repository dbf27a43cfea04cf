"""Small bundles, with fresh weights or a little trained."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.bundles.bundle import Bundle, write_bundle
from engine.config import Config
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.processor import load_prepared_processor
from engine.data.shards import Split
from engine.models.build import build_model
from engine.objectives.contract import Objective, objective_class


def fresh_bundle(config: Config, folder: Path, seed: int = 0, spread: float = 8) -> Bundle:
    """Write a bundle of the config's model with fresh weights, times `spread`: large enough for its answers to differ."""
    objective, model = objective_and_model(config, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(spread)
    return written(config, objective, model, folder)


def taught_bundle(config: Config, folder: Path, steps: int) -> Bundle:
    """Write a bundle of the config's model after so many plain steps of AdamW, a batch of 16 each."""
    objective, model = objective_and_model(config, 1)
    samples = objective.samples(Split.open(prepare(config), "train"))
    optimizer, numbers = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products as small as these take longer on several
    for _ in range(steps):
        chosen = torch.randint(len(samples), (16,), generator=numbers).tolist()
        loss = objective.loss(model, objective.collate([samples[i] for i in chosen]))
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return written(config, objective, model, folder)


def objective_and_model(config: Config, seed: int) -> tuple[Objective, torch.nn.Module]:
    """Return the task on the config's data, and a model with fresh weights."""
    data = prepare(config)
    processor, labels = load_prepared_processor(data), Manifest.load(data).labels
    objective = objective_class(config.objective.name)(config.objective, processor, config.data.sequence_length, labels)
    return objective, build_model(config.model, processor, objective.auto_class, objective.model_options(), seed)


def written(config: Config, objective: Objective, model: torch.nn.Module, folder: Path) -> Bundle:
    """Write a bundle of a model that was made for the config's data."""
    data = prepare(config)
    return write_bundle(
        folder, model=model, objective=objective, name=folder.parent.name,
        golden_requests=objective.golden_requests(Split.open(data, "validation")), data={"folder": str(data), "hash": Manifest.load(data).hash},
    )  # fmt: skip

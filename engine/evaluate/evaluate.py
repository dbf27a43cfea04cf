"""Measure a bundle on held-out data; compare two on the same examples."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.config import Config, with_values
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.bootstrap import Interval, compare, intervals
from engine.objectives.contract import Objective, Scores, join_scores
from engine.progress import Bar, console


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one bundle."""

    bundle: str
    examples: int
    metrics: dict[str, Interval]
    majority: Interval | None  # accuracy of always naming the training data's most frequent class
    scores: Scores
    seconds: float


def evaluate_bundle(folder: Path, config: Config) -> Evaluation:
    """Measure the bundle in `folder` on config.data's split config.evaluate.split, tokenized by the bundle's tokenizer.

    Raises UserError where the data's labels aren't the bundle's, or the split is empty.
    """
    began = time.perf_counter()
    bundle = Bundle.open(folder)
    bundle.verify()
    objective = bundle.objective()
    data = prepare(config, folder)
    labels = Manifest.load(data).labels
    if labels and labels != objective.labels:
        unknown = sorted(set(labels) ^ set(objective.labels))
        raise UserError(
            f"the data's labels are not those of {folder.parent.name} ({', '.join(unknown[:5])} differ): "
            "evaluate on data with the same labels, or fine-tune the bundle on these"
        )
    split = Split.open(data, config.evaluate.split)
    scores = score(bundle, objective, split, config.evaluate.batch)
    settings = config.evaluate.confidence, config.evaluate.resamples, config.seed
    majority = None
    if "label" in scores:
        frequent = int(np.bincount(Split.open(data, "train").labels).argmax())
        always = scores | {"predicted": np.full_like(scores["label"], frequent)}
        majority = intervals(objective, always, *settings)["accuracy"]
    metrics = intervals(objective, scores, *settings)
    return Evaluation(
        str(folder), len(next(iter(scores.values()))), metrics, majority, scores, time.perf_counter() - began
    )


def score(bundle: Bundle, objective: Objective, split: Split, batch: int) -> Scores:
    """Score every sample of a split, in its order; the longest go first, together, to save padding."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bundle.model().to(device)
    samples = objective.samples(split)
    order = np.argsort([-len(samples[i]["tokens"]) for i in range(len(samples))], kind="stable")
    parts = []
    with Bar("evaluate", total=len(order)) as bar:
        for first in range(0, len(order), batch):
            mine = order[first : first + batch]
            parts.append(objective.score(model, objective.collate([samples[i] for i in mine]).to(device)))
            bar.update(first + len(mine))
    scores = join_scores(parts)
    back = np.argsort(order)
    return {name: values[back] for name, values in scores.items()}


def evaluate_and_show(config: Config) -> None:
    """Evaluate config.bundle, and config.evaluate.against if given; show and keep what was found."""
    if not config.bundle:
        raise UserError("evaluate needs a bundle: say which with bundle=NAME_OR_FOLDER")

    def measure(reference: str) -> Evaluation:
        return evaluate_bundle(find_bundle(reference, Path(config.runs_dir), config.tracking_uri), config)

    found = {config.bundle: measure(config.bundle)}
    if config.evaluate.against:
        found[config.evaluate.against] = measure(config.evaluate.against)
    table = Table("bundle", "metric", "value", f"{config.evaluate.confidence:.0%} interval", "examples")
    for reference, evaluation in found.items():
        rows = evaluation.metrics | (
            {"accuracy of the majority class": evaluation.majority} if evaluation.majority else {}
        )
        for name, value in rows.items():
            table.add_row(
                reference, name, f"{value.value:.4f}", f"{value.low:.4f} to {value.high:.4f}", str(evaluation.examples)
            )
    console.print(table)
    facts = {
        reference: {
            "metrics": {n: i.to_dict() for n, i in e.metrics.items()},
            "examples": e.examples,
            "folder": e.bundle,
        }
        for reference, e in found.items()
    }
    if config.evaluate.against:
        a, b = found.values()
        objective = Bundle.open(a.bundle).objective()
        verdict = compare(
            objective, a.scores, b.scores, config.evaluate.confidence, config.evaluate.resamples, config.seed
        )
        console.print(
            f"{config.bundle} is {verdict.verdict} {'from' if 'told' in verdict.verdict else 'than'} {config.evaluate.against}: "
            f"{verdict.metric} differs by {verdict.difference:+.4f} ({verdict.low:+.4f} to {verdict.high:+.4f})"
        )
        facts["comparison"] = asdict(verdict)
    file = config.run_dir / "evaluation.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1))
    console.print(f"kept in {file}")


def for_evaluation(config: Config, evaluate: dict[str, object]) -> Config:
    """Return `config` with other options of the evaluate group."""
    return with_values(config, {f"evaluate.{name}": value for name, value in evaluate.items()})

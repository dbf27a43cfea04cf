"""Measure a bundle on held-out data; compare two on the same examples."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.config import Config
from engine.data.manifest import Manifest
from engine.data.packing import Packing
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.bootstrap import Comparison, Interval, compare, intervals
from engine.objectives.contract import Objective, Scores, check_data, join_scores
from engine.progress import Bar, console


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one bundle."""

    bundle: Path
    objective: Objective
    data: Path  # prepared with the bundle's tokenizer
    examples: int
    metrics: dict[str, Interval]
    majority: Interval | None  # accuracy of always naming the training data's most frequent class
    scores: Scores
    seconds: float


def evaluate_bundle(folder: Path, config: Config) -> Evaluation:
    """Measure the bundle in `folder` on config.data's split config.evaluate.split, tokenized by the bundle's tokenizer.

    Raises UserError where the bundle was altered, the data are not for its task or have labels that it doesn't know, or
    the split is empty.
    """
    began = time.perf_counter()
    bundle = Bundle.open(folder)
    bundle.verify()
    objective = bundle.objective(Packing.of(config.data))
    check_data(objective.options.name, config.data, str(folder))
    with Bar("prepare", total=100) as bar:
        data = prepare(config, folder, lambda stage, done, total: bar.update(99 * done // total if total else 0, stage))
        bar.update(100, str(data))
    classes = np.empty(0, np.int64)
    if objective.labels:
        classes = known_classes(folder, Manifest.load(data).labels, objective.labels)
    scores = score(bundle, objective, Split.open(data, config.evaluate.split), classes, config.evaluate.batch)
    settings = config.evaluate.confidence, config.evaluate.resamples, config.seed
    majority = None
    if "label" in scores and len(classes):
        frequent = classes[int(np.argmax(np.bincount(Split.open(data, "train").labels)))]
        always = scores | {"predicted": np.full_like(scores["label"], frequent)}
        majority = intervals(objective, always, *settings)["accuracy"]
    metrics = intervals(objective, scores, *settings)
    examples = len(next(iter(scores.values())))
    return Evaluation(folder, objective, data, examples, metrics, majority, scores, time.perf_counter() - began)


def known_classes(folder: Path, data_labels: Sequence[str], bundle_labels: Sequence[str]) -> np.ndarray:
    """Map the data's classes to the bundle's: int64 [data's classes]. Raises UserError for labels that it doesn't know."""
    name = folder.parent.name if folder.name == "bundle" else folder.name
    if unknown := [label for label in data_labels if label not in bundle_labels]:
        raise UserError(
            f"the data's labels are not those of {name} ({', '.join(unknown[:5])}; it knows {', '.join(bundle_labels[:10])}): "
            "evaluate on data with the same labels, or fine-tune the bundle on yours"
        )
    return np.array([bundle_labels.index(label) for label in data_labels], dtype=np.int64)


def score(bundle: Bundle, objective: Objective, split: Split, classes: np.ndarray, batch: int) -> Scores:
    """Score every sample of a split, in its order; those of like length go together, the longest first, to save padding."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bundle.model().to(device)
    objective.meet(model.config)
    samples = objective.samples(split)
    order = np.argsort([-len(samples[i].get("tokens", ())) for i in range(len(samples))], kind="stable")
    parts = []
    with Bar("evaluate", total=len(order)) as bar:
        for first in range(0, len(order), batch):
            chosen = [samples[i] | {"draw": i} for i in order[first : first + batch]]
            if len(classes):
                chosen = [sample | {"label": classes[sample["label"]]} for sample in chosen]
            parts.append(objective.score(model, objective.collate(chosen).to(device)))
            bar.update(first + len(chosen))
    back = np.argsort(order)
    return objective.complete({name: values[back] for name, values in join_scores(parts).items()})


def compare_evaluations(a: Evaluation, b: Evaluation, config: Config) -> Comparison:
    """Compare two bundles. Raises UserError where their figures don't mean the same."""
    first, second = a.objective, b.objective
    if first.options.name != second.options.name:
        raise UserError(
            f"{a.bundle} is for {first.options.name} and {b.bundle} for {second.options.name}: compare bundles of one task"
        )
    if "tokens" in a.scores and (a.data, first.sequence_length) != (b.data, second.sequence_length):
        raise UserError(
            f"{a.bundle} and {b.bundle} differ in tokenizer or sequence length, so their losses a token don't compare: "
            "evaluate each alone"
        )
    return compare(first, a.scores, b.scores, config.evaluate.confidence, config.evaluate.resamples, config.seed)


def evaluate_and_show(config: Config) -> None:
    """Evaluate config.bundle, and config.evaluate.against if given; show what was found, and keep it as evaluation.json."""
    if not config.bundle:
        raise UserError("evaluate needs a bundle: say which with bundle=NAME_OR_FOLDER")
    references = [name for name in (config.bundle, config.evaluate.against) if name]
    folders = [find_bundle(name, Path(config.runs_dir), config.tracking_uri) for name in references]
    found = [evaluate_bundle(folder, config) for folder in folders]
    verdict = compare_evaluations(found[0], found[1], config) if config.evaluate.against else None

    table = Table("bundle", "metric", "value", f"{100 * config.evaluate.confidence:g} % interval", "examples")
    for name, evaluation in zip(references, found, strict=True):
        for metric, value in evaluation.metrics.items():
            table.add_row(name, metric, *_cells(value), f"{evaluation.examples:,}")
    if (majority := found[0].majority) is not None:
        table.add_row("majority class", "accuracy", *_cells(majority), f"{found[0].examples:,}")
    console.print(table)
    if verdict:
        judged = verdict.verdict if verdict.verdict == "not told apart" else f"{verdict.verdict} than"
        console.print(
            f"{references[0]} is {judged}{' from' if judged == verdict.verdict else ''} {references[1]}: {verdict.metric} differs by "
            f"{verdict.difference:+.4f} ({verdict.low:+.4f} to {verdict.high:+.4f}, paired bootstrap)"
        )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir / "evaluation.json"
    facts = {
        "split": config.evaluate.split,
        "confidence": config.evaluate.confidence,
        "bundles": [_facts(name, evaluation) for name, evaluation in zip(references, found, strict=True)],
        "comparison": verdict and asdict(verdict),
    }
    file.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"kept in {file}")


def _cells(value: Interval) -> tuple[str, str]:
    return f"{value.value:.4f}", f"{value.low:.4f} to {value.high:.4f}"


def _facts(name: str, evaluation: Evaluation) -> dict[str, object]:
    return {
        "bundle": name,
        "folder": str(evaluation.bundle),
        "hash": Bundle.open(evaluation.bundle).hash,
        "data": str(evaluation.data),
        "examples": evaluation.examples,
        "seconds": round(evaluation.seconds, 3),
        "metrics": {metric: value.to_dict() for metric, value in evaluation.metrics.items()},
        "majority": evaluation.majority and evaluation.majority.to_dict(),
    }

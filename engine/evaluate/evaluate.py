"""Evaluate a bundle on held-out data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.bundles.bundle import Bundle
from engine.config import Config
from engine.data.manifest import Manifest
from engine.data.packing import Packing
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.data.slice_values import read_slice_values
from engine.errors import UserError
from engine.evaluate.bootstrap import Interval, bootstrap_intervals, num_examples
from engine.evaluate.frechet_distance import ImageEvaluation, evaluate_images
from engine.evaluate.generation import GenerationEvaluation, evaluate_generation
from engine.evaluate.metrics import compute_metrics, reference_values, score_collectors
from engine.evaluate.pairs import PairEvaluation, evaluate_pairs
from engine.evaluate.slices import Slice, evaluate_slices
from engine.objectives.contract import Objective, Scores, check_data, concat_scores
from engine.progress import ProgressBar


@dataclass(frozen=True)
class Evaluation:
    """The results for one bundle."""

    bundle: Bundle
    objective: Objective
    data: Path  # prepared with the bundle's tokenizer
    data_hash: str
    examples: int
    metrics: dict[str, Interval]
    majority: Interval | None  # accuracy of always predicting the most frequent class of the training data
    scores: Scores
    seconds: float
    slices: list[Slice]
    pairs: PairEvaluation | None
    generation: GenerationEvaluation | None
    images: ImageEvaluation | None


def evaluate_bundle(folder: Path, config: Config) -> Evaluation:
    """Evaluate the bundle in `folder` on the split config.evaluate.split of config.data, tokenized by the bundle's tokenizer.

    Raises UserError if the bundle was altered, the data are not for its objective or have unknown labels, or the split is
    empty.
    """
    started = time.perf_counter()
    options = config.evaluate
    bundle = Bundle.open(folder)
    bundle.verify()
    objective = bundle.objective(Packing(config.data.packing, config.data.within_documents))
    check_data(objective.options.name, config.data, str(folder))
    if options.slice_column and not objective.kind.has_sliceable_rows:
        raise UserError(
            f"evaluate.slice_column groups labeled texts, and {objective.options.name} is not evaluated on those: leave it out"
        )
    with ProgressBar("prepare", total=100) as bar:
        data = prepare(config, folder, lambda stage, done, total: bar.update(99 * done // total if total else 0, stage))
        bar.update(100, str(data))
    manifest, split, classes = Manifest.load(data), Split.open(data, options.split), np.empty(0, np.int64)
    if objective.labels:
        classes = map_classes(folder, manifest.labels, objective.labels)
    model = bundle.model().to("cuda" if torch.cuda.is_available() else "cpu")
    scores = score_split(model, objective, split, classes, options.batch)
    bootstrap = options.confidence, options.resamples, config.seed
    summarize = partial(compute_metrics, objective)
    majority = None
    if objective.is_classifier and len(classes):
        most_frequent = classes[int(np.argmax(np.bincount(Split.open(data, "train").labels)))]
        majority_scores = scores | {"predicted": np.full_like(scores["label"], most_frequent)}
        majority = bootstrap_intervals(objective.summarize, majority_scores, *bootstrap)["accuracy"]
    metrics = bootstrap_intervals(summarize, scores, *bootstrap)
    for name, value in reference_values(objective, scores).items():
        metrics[name] = replace(metrics[name], value=value)
    slices = []
    if options.slice_column:
        groups = read_slice_values(config.data, options.slice_column, split, objective.tokenizer)
        slices = evaluate_slices(summarize, scores, groups, *bootstrap)
    pairs = evaluate_pairs(bundle, model, Path(options.pairs), *bootstrap) if options.pairs else None
    generation = evaluate_generation(bundle, model, options, config.seed) if options.generation else None
    images = None
    if options.images and objective.image_output_size(model.config):
        images = evaluate_images(bundle, model, split, Split.open(data, "train"), classes, options, config.seed)
    return Evaluation(
        bundle=bundle,
        objective=objective,
        data=data,
        data_hash=manifest.hash,
        examples=num_examples(scores),
        metrics=metrics,
        majority=majority,
        scores=scores,
        seconds=time.perf_counter() - started,
        slices=slices,
        pairs=pairs,
        generation=generation,
        images=images,
    )


def map_classes(folder: Path, data_labels: Sequence[str], bundle_labels: Sequence[str]) -> np.ndarray:
    """Map the classes of the data to those of the bundle: int64 [classes of the data]. Raises UserError for unknown labels."""
    name = folder.parent.name if folder.name == "bundle" else folder.name
    if unknown := [label for label in data_labels if label not in bundle_labels]:
        raise UserError(
            f"the data's labels are not those of {name} ({', '.join(unknown[:5])}; it knows {', '.join(bundle_labels[:10])}): "
            "evaluate on data with the same labels, or fine-tune the bundle on yours"
        )
    return np.array([bundle_labels.index(label) for label in data_labels], dtype=np.int64)


def score_split(model: nn.Module, objective: Objective, split: Split, classes: np.ndarray, batch_size: int) -> Scores:
    """Return the scores of every sample of a split, in order; samples of similar length are batched to save padding."""
    device = next(model.parameters()).device
    objective.bind_model(model.config)
    collectors = score_collectors(objective)
    samples = objective.samples(split)
    longest_first = np.argsort([-len(samples[i].get("tokens", ())) for i in range(len(samples))], kind="stable")
    parts = []
    with ProgressBar("evaluate", total=len(longest_first)) as bar:
        for start in range(0, len(longest_first), batch_size):
            chosen = [samples[i] | {"draw": i} for i in longest_first[start : start + batch_size]]
            if len(classes):
                chosen = [objective.relabel(sample, classes) for sample in chosen]
            batch = objective.collate(chosen)
            scores = objective.score(model, batch.to(device))
            for collect in collectors:
                scores |= collect(batch)
            parts.append(scores)
            bar.update(start + len(chosen))
    original_order = np.argsort(longest_first)
    return objective.finalize_scores({name: values[original_order] for name, values in concat_scores(parts).items()})

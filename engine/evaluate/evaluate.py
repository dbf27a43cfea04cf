"""Measure a bundle on held-out data; compare two on the same examples."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from engine.bundles.bundle import Bundle
from engine.bundles.card import CARD, add_evaluation
from engine.bundles.find import find_bundle
from engine.config import Config, with_values
from engine.data.slice_values import read_slice_values
from engine.data.manifest import Manifest
from engine.data.packing import Packing
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.bootstrap import Comparison, Interval, compare_paired, num_examples, bootstrap_intervals
from engine.evaluate.evaluation_page import write_evaluation_page
from engine.evaluate.generation import GenerationEvaluation, evaluate_generation
from engine.evaluate.harness import run_harness
from engine.evaluate.images import ImageEvaluation, describe_images, evaluate_images
from engine.evaluate.metrics import ByteCounter, classification_details, reference_values, compute_metrics
from engine.evaluate.pairs import PairEvaluation, evaluate_pairs
from engine.evaluate.slices import Slice, evaluate_slices
from engine.objectives.contract import Objective, Scores, check_data, concat_scores
from engine.progress import Bar, console


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one bundle."""

    bundle: Bundle
    objective: Objective
    data: Path  # prepared with the bundle's tokenizer
    data_hash: str
    examples: int
    metrics: dict[str, Interval]
    majority: Interval | None  # accuracy of always naming the training data's most frequent class
    scores: Scores
    seconds: float
    slices: list[Slice]
    pairs: PairEvaluation | None
    generation: GenerationEvaluation | None
    images: ImageEvaluation | None


def evaluate_bundle(folder: Path, config: Config) -> Evaluation:
    """Measure the bundle in `folder` on config.data's split config.evaluate.split, tokenized by the bundle's tokenizer.

    Raises UserError where the bundle was altered, the data are not for its task or have labels that it doesn't know, or
    the split is empty.
    """
    began = time.perf_counter()
    options = config.evaluate
    bundle = Bundle.open(folder)
    bundle.verify()
    objective = bundle.objective(Packing(config.data.packing, config.data.within_documents))  # each sample once
    check_data(objective.options.name, config.data, str(folder))
    if options.slice_column and objective.data_kind != "labelled":
        raise UserError(
            f"evaluate.slice_column groups labelled texts, and {objective.options.name} is not measured on those: leave it out"
        )
    with Bar("prepare", total=100) as bar:
        data = prepare(config, folder, lambda stage, done, total: bar.update(99 * done // total if total else 0, stage))
        bar.update(100, str(data))
    manifest, split, classes = Manifest.load(data), Split.open(data, options.split), np.empty(0, np.int64)
    if objective.labels:
        classes = known_classes(folder, manifest.labels, objective.labels)
    model = bundle.model().to("cuda" if torch.cuda.is_available() else "cpu")
    scores = score_split(model, objective, split, classes, options.batch)
    settings = options.confidence, options.resamples, config.seed
    summarize = partial(compute_metrics, objective)
    majority = None
    if "label" in scores and len(classes):
        frequent = classes[int(np.argmax(np.bincount(Split.open(data, "train").labels)))]
        always = scores | {"predicted": np.full_like(scores["label"], frequent)}
        majority = bootstrap_intervals(objective.summarize, always, *settings)["accuracy"]
    metrics = bootstrap_intervals(summarize, scores, *settings)
    for name, value in reference_values(objective, scores).items():
        metrics[name] = replace(metrics[name], value=value)
    slices = []
    if options.slice_column:
        groups = read_slice_values(config.data, options.slice_column, split, objective.tokenizer)
        slices = evaluate_slices(summarize, scores, groups, *settings)
    pairs = evaluate_pairs(bundle, model, Path(options.pairs), *settings) if options.pairs else None
    generation = evaluate_generation(bundle, model, options, config.seed) if options.generation else None
    images = None
    if options.images and objective.image_output_size(model.config):
        images = evaluate_images(bundle, model, split, Split.open(data, "train"), classes, options, config.seed)
    return Evaluation(
        bundle, objective, data, manifest.hash, num_examples(scores), metrics, majority, scores, time.perf_counter() - began,
        slices, pairs, generation, images,
    )  # fmt: skip


def known_classes(folder: Path, data_labels: Sequence[str], bundle_labels: Sequence[str]) -> np.ndarray:
    """Map the data's classes to the bundle's: int64 [data's classes]. Raises UserError for labels that it doesn't know."""
    name = folder.parent.name if folder.name == "bundle" else folder.name
    if unknown := [label for label in data_labels if label not in bundle_labels]:
        raise UserError(
            f"the data's labels are not those of {name} ({', '.join(unknown[:5])}; it knows {', '.join(bundle_labels[:10])}): "
            "evaluate on data with the same labels, or fine-tune the bundle on yours"
        )
    return np.array([bundle_labels.index(label) for label in data_labels], dtype=np.int64)


def score_split(model: nn.Module, objective: Objective, split: Split, classes: np.ndarray, batch: int) -> Scores:
    """Score every sample of a split, in its order; those of like length go together, the longest first, to save padding."""
    device = next(model.parameters()).device
    objective.bind_model(model.config)
    writes = objective.auto_class == "AutoModelForCausalLM"
    count_bytes = ByteCounter(objective.tokenizer) if writes else None
    samples = objective.samples(split)
    order = np.argsort([-len(samples[i].get("tokens", ())) for i in range(len(samples))], kind="stable")
    parts = []
    with Bar("evaluate", total=len(order)) as bar:
        for first in range(0, len(order), batch):
            chosen = [samples[i] | {"draw": i} for i in order[first : first + batch]]
            if len(classes):
                chosen = [sample | {"label": classes[sample["label"]]} for sample in chosen]
            collated = objective.collate(chosen)
            parts.append(objective.score(model, collated.to(device)))
            if count_bytes:
                parts[-1]["bytes"] = count_bytes(collated.targets.numpy())
            bar.update(first + len(chosen))
    back = np.argsort(order)
    return objective.finalize_scores({name: values[back] for name, values in concat_scores(parts).items()})


def compare_evaluations(a: Evaluation, b: Evaluation, config: Config) -> Comparison:
    """Compare two bundles. Raises UserError where their figures don't mean the same."""
    first, second = a.objective, b.objective
    check_comparable(a.bundle, b.bundle)
    if (
        first.metric == "loss"
        and "tokens" in a.scores
        and (a.data, first.sequence_length) != (b.data, second.sequence_length)
    ):
        raise UserError(
            f"{a.bundle.folder} and {b.bundle.folder} differ in tokenizer or sequence length, so their losses a token don't "
            "compare: evaluate each alone"
        )
    return compare_paired(first, a.scores, b.scores, config.evaluate.confidence, config.evaluate.resamples, config.seed)


def check_comparable(a: Bundle, b: Bundle) -> None:
    """Raise UserError, before anything is measured, for bundles of two tasks or with other labels."""
    first, second = a.objective(), b.objective()
    if first.options.name != second.options.name:
        raise UserError(
            f"{a.folder} is for {first.options.name} and {b.folder} for {second.options.name}: compare bundles of one task"
        )
    if set(first.labels) != set(second.labels):
        differ = sorted(set(first.labels) ^ set(second.labels))
        raise UserError(
            f"{a.folder} and {b.folder} know other labels ({', '.join(differ[:5])} in one of them only): "
            "compare bundles that were trained on the same data"
        )


def with_training_data(config: Config, bundle: Bundle, name: str) -> Config:
    """Return the config with the data that a bundle was trained on. Raises UserError where they aren't known or are gone."""
    manifest = _trained_on(bundle, name)
    values = {f"data.{key}": value for key, value in manifest.config.items()}
    return with_values(config, values | {"seed": manifest.seed, "objective.name": bundle.objective().options.name})


def check_same_data(a: Bundle, b: Bundle, names: Sequence[str]) -> None:
    """Raise UserError where two bundles were trained on other data, so that one may have learnt what tests the other."""
    first, second = (_trained_on(bundle, name) for bundle, name in zip((a, b), names, strict=True))
    same = first.sources.get("sha256") == second.sources.get("sha256") and first.seed == second.seed
    if first.hash != second.hash and not same:
        raise UserError(
            f"{names[0]} was trained on {first.name} ({first.hash[:8]}) and {names[1]} on {second.name} ({second.hash[:8]}): "
            "say which data to compare them on with data=... or data.path=..."
        )


def _trained_on(bundle: Bundle, name: str) -> Manifest:
    place = bundle.manifest and bundle.manifest.data
    if not place:
        raise UserError(
            f"{name} does not say what data it was trained on: say which to use with data=... or data.path=..."
        )
    return Manifest.load(place["folder"])


def evaluate_and_show(config: Config) -> Comparison | None:
    """Evaluate config.bundle, and config.evaluate.against if given; show what was found, and keep it.

    It is kept as evaluation.json and evaluation.html in the run's folder, and added to the bundle's card.
    """
    if not config.bundle:
        raise UserError("evaluate needs a bundle: say which with bundle=NAME_OR_FOLDER")
    references = [name for name in (config.bundle, config.evaluate.against) if name]
    folders = [find_bundle(name, Path(config.runs_dir), config.tracking_uri) for name in references]
    if config.evaluate.suite == "lm_eval":
        run_and_print_harness(references, folders, config)
        return None
    if config.evaluate.features:
        features = find_bundle(config.evaluate.features, Path(config.runs_dir), config.tracking_uri)
        config = with_values(config, {"evaluate.features": str(features)})
    if len(folders) == 2:
        check_comparable(*(Bundle.open(folder) for folder in folders))
    found = [evaluate_bundle(folder, config) for folder in folders]
    verdict = compare_evaluations(found[0], found[1], config) if config.evaluate.against else None
    print_evaluations(references, found, config)
    if verdict:
        console.print(describe_comparison(verdict, references))
    facts = {
        "split": config.evaluate.split,
        "confidence": config.evaluate.confidence,
        "bundles": [evaluation_record(name, evaluation, config) for name, evaluation in zip(references, found, strict=True)],
        "comparison": verdict and asdict(verdict),
    }
    save_evaluations(found, facts, config)
    return verdict


def run_and_print_harness(references: Sequence[str], folders: Sequence[Path], config: Config) -> None:
    """Run lm-eval's tasks on the bundles, show what was found, and keep it as lm_eval.json."""
    table, kept = Table("bundle", "metric", "value", "95 % interval"), []
    for name, folder in zip(references, folders, strict=True):
        bundle = Bundle.open(folder)
        bundle.verify()
        found = run_harness(bundle, config.evaluate, config.seed)
        kept.append({"bundle": name, "hash": bundle.hash, "metrics": found})
        for metric, value in found.items():
            table.add_row(name, metric, *_cells(Interval(**value)))
    console.print(table)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir / "lm_eval.json"
    file.write_text(json.dumps({"tasks": config.evaluate.tasks, "bundles": kept}, indent=1) + "\n")
    console.print(f"kept in {file}")


def print_evaluations(references: Sequence[str], found: Sequence[Evaluation], config: Config) -> None:
    """Print what was measured."""
    table = Table("bundle", "metric", "value", f"{100 * config.evaluate.confidence:g} % interval", "examples")
    for name, evaluation in zip(references, found, strict=True):
        extras = [("", evaluation.metrics, evaluation.examples)]
        if evaluation.pairs:
            extras.append(("pairs: ", evaluation.pairs.metrics, evaluation.pairs.pairs))
        if evaluation.generation:
            extras.append(("written: ", evaluation.generation.metrics, evaluation.generation.examples))
        if evaluation.images:
            checked = evaluation.images
            extras.append((f"images, features of {checked.features}: ", checked.metrics, checked.images))
        for start, metrics, examples in extras:
            for metric, value in metrics.items():
                table.add_row(name, start + metric, *_cells(value), f"{examples:,}")
        table.add_section()
    if (majority := found[0].majority) is not None:
        table.add_row("majority class", "accuracy", *_cells(majority), f"{found[0].examples:,}")
    console.print(table)
    for name, evaluation in zip(references, found, strict=True):
        if evaluation.slices:
            console.print(slice_table(name, evaluation.slices, config))


def slice_table(name: str, slices: Sequence[Slice], config: Config) -> Table:
    """Return the metrics of each group, and what is between them and those of all other groups together."""
    column = config.evaluate.slice_column
    table = Table(
        str(column), "metric", "value", "minus the others", box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left",
        title=f"{name} by {column}, with {100 * config.evaluate.confidence:g} % intervals",
    )  # fmt: skip
    for one in slices:
        first = [one.group, f"{one.examples:,} examples"]
        for at, (metric, value) in enumerate(one.metrics.items()):
            table.add_row(first[at] if at < len(first) else "", metric, _in_short(value), _in_short(one.gaps[metric]))
    return table


def describe_comparison(found: Comparison, names: Sequence[str]) -> str:
    """Say a comparison in a sentence."""
    judged = found.verdict if found.verdict == "not told apart" else f"{found.verdict} than"
    return (
        f"{names[0]} is {judged}{' from' if judged == found.verdict else ''} {names[1]}: {found.metric} differs by "
        f"{found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f}, paired bootstrap)"
    )


def save_evaluations(found: Sequence[Evaluation], facts: dict[str, Any], config: Config) -> None:
    """Write evaluation.json and the page, and add to the cards; what is registered stays as it was registered."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir / "evaluation.json"
    file.write_text(json.dumps(facts, indent=1) + "\n")
    page = write_evaluation_page(config.run_dir, facts)
    for evaluation, told in zip(found, facts["bundles"], strict=True):
        folder = evaluation.bundle.folder
        manifest = evaluation.bundle.manifest
        if manifest and CARD in manifest.files and config.registry_dir not in folder.absolute().parents:
            about = {key: value for key, value in told.items() if key not in ("folder", "details")}
            add_evaluation(folder, manifest.hash, about, card_section(told))
            console.print(f"added to {folder / CARD}")
    console.print(f"kept in {file}\npage    {page}")


def _cells(value: Interval) -> tuple[str, str]:
    return f"{value.value:.4f}", f"{value.low:.4f} to {value.high:.4f}"


def _in_short(value: Interval) -> str:
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"


def evaluation_record(name: str, evaluation: Evaluation, config: Config) -> dict[str, Any]:
    """Return an evaluation as plain values, as evaluation.json and the card hold it."""
    return {
        "id": uuid.uuid4().hex,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": name,
        "folder": str(evaluation.bundle.folder),
        "hash": evaluation.bundle.hash,
        "data": str(evaluation.data),
        "data_hash": evaluation.data_hash,
        "split": config.evaluate.split,
        "confidence": config.evaluate.confidence,
        "examples": evaluation.examples,
        "seconds": round(evaluation.seconds, 3),
        "metrics": {metric: value.to_dict() for metric, value in evaluation.metrics.items()},
        "majority": evaluation.majority and evaluation.majority.to_dict(),
        "slice_column": config.evaluate.slice_column,
        "slices": [one.to_dict() for one in evaluation.slices],
        "pairs": evaluation.pairs and evaluation.pairs.to_dict(),
        "generation": evaluation.generation and evaluation.generation.to_dict(),
        "images": evaluation.images and evaluation.images.to_dict(),
        "details": classification_details(evaluation.objective, evaluation.scores),
    }


def card_section(facts: dict[str, Any]) -> str:
    """Return an evaluation as Markdown."""
    head = f"| metric | value | {100 * facts['confidence']:g} % interval |\n| --- | --- | --- |"

    def rows(metrics: dict[str, dict[str, float]], start: str = "") -> str:
        return "\n".join(
            f"| {start}{n} | {v['value']:.4f} | {v['low']:.4f} to {v['high']:.4f} |" for n, v in metrics.items()
        )

    data = f"{Path(facts['data']).name} (hash `{facts['data_hash']}`)"
    parts = [
        f"The {facts['split']} split of {data}, {facts['examples']:,} examples.\n\n{head}\n{rows(facts['metrics'])}"
    ]
    for one in facts["slices"]:
        title = f"### {facts['slice_column']}: {one['group']} ({one['examples']:,} examples)"
        parts.append(f"{title}\n\n{head}\n{rows(one['metrics'])}\n{rows(one['gaps'], 'gap to the others: ')}")
    for key, title in (("pairs", "Bias check over {} pairs of {}"), ("generation", "Written text, {} examples of {}")):
        if told := facts[key]:
            size = told.get("pairs", told.get("examples"))
            parts.append(f"### {title.format(size, told['file'])}\n\n{head}\n{rows(told['metrics'])}")
    if told := facts["images"]:
        parts.append(f"### {describe_images(told)}\n\n{head}\n{rows(told['metrics'])}")
    return "\n\n".join(parts)

"""The evaluate job: evaluate one bundle or compare two, print the results and save them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.config import Config, with_values
from engine.errors import UserError
from engine.evaluate.bootstrap import Comparison, Interval
from engine.evaluate.comparison import check_comparable, compare_evaluations, describe_comparison
from engine.evaluate.evaluate import evaluate_bundle
from engine.evaluate.evaluation_record import evaluation_record, save_evaluations
from engine.evaluate.evaluation_tables import interval_cells, metrics_table, slice_table
from engine.evaluate.harness import run_harness
from engine.progress import console


def run_evaluation(config: Config) -> Comparison | None:
    """Evaluate config.bundle, and config.evaluate.against if it is set; print and save the results.

    They are saved as evaluation.json and evaluation.html in the run's folder, and added to the bundle's model card.
    """
    if not config.bundle:
        raise UserError("evaluate needs a bundle: say which with bundle=NAME_OR_FOLDER")
    names = [name for name in (config.bundle, config.evaluate.against) if name]
    folders = [find_bundle(name, Path(config.runs_dir), config.tracking_uri) for name in names]
    if config.evaluate.suite == "lm_eval":
        run_lm_eval(names, folders, config)
        return None
    if config.evaluate.features:
        features = find_bundle(config.evaluate.features, Path(config.runs_dir), config.tracking_uri)
        config = with_values(config, {"evaluate.features": str(features)})
    if len(folders) == 2:
        check_comparable(*(Bundle.open(folder) for folder in folders))
    evaluations = [evaluate_bundle(folder, config) for folder in folders]
    comparison = compare_evaluations(evaluations[0], evaluations[1], config) if config.evaluate.against else None
    console.print(metrics_table(names, evaluations, config))
    for name, evaluation in zip(names, evaluations, strict=True):
        if evaluation.slices:
            console.print(slice_table(name, evaluation.slices, config))
    if comparison:
        console.print(describe_comparison(comparison, names))
    content = {
        "split": config.evaluate.split,
        "confidence": config.evaluate.confidence,
        "bundles": [evaluation_record(name, e, config) for name, e in zip(names, evaluations, strict=True)],
        "comparison": comparison and asdict(comparison),
    }
    save_evaluations(evaluations, content, config)
    return comparison


def run_lm_eval(names: Sequence[str], folders: Sequence[Path], config: Config) -> None:
    """Run tasks of lm-eval on the bundles, print the results and save them as lm_eval.json."""
    table, records = Table("bundle", "metric", "value", "95 % interval"), []
    for name, folder in zip(names, folders, strict=True):
        bundle = Bundle.open(folder)
        bundle.verify()
        metrics = run_harness(bundle, config.evaluate, config.seed)
        records.append({"bundle": name, "hash": bundle.hash, "metrics": metrics})
        for metric, value in metrics.items():
            table.add_row(name, metric, *interval_cells(Interval(**value)))
    console.print(table)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir / "lm_eval.json"
    file.write_text(json.dumps({"tasks": config.evaluate.tasks, "bundles": records}, indent=1) + "\n")
    console.print(f"saved in {file}")

"""An evaluation as plain values, as evaluation.json and the model card hold it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.bundles.model_card import CARD, add_evaluation
from engine.config import Config
from engine.evaluate.evaluate import Evaluation
from engine.evaluate.evaluation_page import write_evaluation_page
from engine.evaluate.frechet_distance import describe_images
from engine.evaluate.metrics import classification_details
from engine.progress import console


def evaluation_record(name: str, evaluation: Evaluation, config: Config) -> dict[str, Any]:
    """Return an evaluation as plain values."""
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
        "metrics": {metric: interval.to_dict() for metric, interval in evaluation.metrics.items()},
        "majority": evaluation.majority and evaluation.majority.to_dict(),
        "slice_column": config.evaluate.slice_column,
        "slices": [group.to_dict() for group in evaluation.slices],
        "pairs": evaluation.pairs and evaluation.pairs.to_dict(),
        "generation": evaluation.generation and evaluation.generation.to_dict(),
        "images": evaluation.images and evaluation.images.to_dict(),
        "details": classification_details(evaluation.objective, evaluation.scores),
    }


def save_evaluations(evaluations: Sequence[Evaluation], content: dict[str, Any], config: Config) -> None:
    """Write evaluation.json and evaluation.html, and add to the bundles' cards; registered bundles are left unchanged."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir / "evaluation.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    page = write_evaluation_page(config.run_dir, content)
    for evaluation, record in zip(evaluations, content["bundles"], strict=True):
        folder, manifest = evaluation.bundle.folder, evaluation.bundle.manifest
        if manifest and CARD in manifest.files and config.registry_dir not in folder.absolute().parents:
            on_card = {key: value for key, value in record.items() if key not in ("folder", "details")}
            add_evaluation(folder, manifest.hash, on_card, card_section(record))
            console.print(f"added to {folder / CARD}")
    console.print(f"saved in {file}\npage     {page}")


def card_section(record: dict[str, Any]) -> str:
    """Return an evaluation as Markdown."""
    head = f"| metric | value | {100 * record['confidence']:g} % interval |\n| --- | --- | --- |"

    def rows(metrics: dict[str, dict[str, float]], prefix: str = "") -> str:
        return "\n".join(
            f"| {prefix}{name} | {v['value']:.4f} | {v['low']:.4f} to {v['high']:.4f} |" for name, v in metrics.items()
        )

    data = f"{Path(record['data']).name} (hash `{record['data_hash']}`)"
    parts = [
        f"The {record['split']} split of {data}, {record['examples']:,} examples.\n\n{head}\n{rows(record['metrics'])}"
    ]
    for group in record["slices"]:
        title = f"### {record['slice_column']}: {group['group']} ({group['examples']:,} examples)"
        parts.append(
            f"{title}\n\n{head}\n{rows(group['metrics'])}\n{rows(group['gaps'], 'difference from the others: ')}"
        )
    titles = {"pairs": "Bias check over {} pairs of {}", "generation": "Generated text, {} examples of {}"}
    for key, title in titles.items():
        if result := record[key]:
            size = result.get("pairs", result.get("examples"))
            parts.append(f"### {title.format(size, result['file'])}\n\n{head}\n{rows(result['metrics'])}")
    if images := record["images"]:
        parts.append(f"### {describe_images(images)}\n\n{head}\n{rows(images['metrics'])}")
    return "\n\n".join(parts)

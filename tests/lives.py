"""Small models with a real life: text -> pre-trained -> two fine-tuned ones, one of which learnt more."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder
from engine.train.worker import single_process_group, train_worker

GOOD = ["bright", "warm", "kind", "clear", "lovely", "gentle"]
BAD = ["dull", "cold", "cruel", "muddy", "awful", "harsh"]
NEUTRAL = ["the", "film", "a", "plot", "with", "scenes", "and", "an", "actor", "of", "some", "music"]


@dataclass(frozen=True)
class Lives:
    """The folder of runs, with a config for each."""

    runs_dir: Path
    text: Config
    labelled: Config
    rows: list[dict[str, str]]

    def bundle(self, name: str) -> Bundle:
        """Return a run's bundle: base, good or poor."""
        return Bundle.open(self.runs_dir / name / "bundle")


def rows_of(count: int) -> list[dict[str, str]]:
    """Return sentences; those of the south have a wrong label in three of ten cases."""
    draw = random.Random(3)
    rows = []
    for number in range(count):
        good, region = draw.random() < 0.5, "south" if draw.random() < 0.4 else "north"
        words = draw.choices(NEUTRAL, k=6) + draw.choices(GOOD if good else BAD, k=3)
        draw.shuffle(words)
        wrong = region == "south" and draw.random() < 0.3
        label = "good" if good != wrong else "bad"
        rows.append({"text": f"{' '.join(words)} {number}", "label": label, "region": region})
    return rows


def make_lives(tiny: Config, runs_dir: Path) -> Lives:
    """Train them, in this process."""
    rows = rows_of(600)
    file = runs_dir / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    held = {"data.source": "files", "data.path": str(file), "data.max_documents": None, "data.validation_fraction": 0.1,
            "data.test_fraction": 0.25, "runs_dir": str(runs_dir), "train.checkpoint_every": 1000}  # fmt: skip
    text = with_values(tiny, held | {"data.name": "rows", "name": "base", "train.max_steps": 20})
    run(text, None)
    start = str(runs_dir / "base" / "bundle")
    labelled = with_values(
        text,
        {"job": "finetune", "objective.name": "classification", "data.name": "labelled", "data.label_column": "label",
         "bundle": start, "evaluate.resamples": 200, "evaluate.batch": 64},
    )  # fmt: skip
    run(with_values(labelled, {"name": "good", "train.max_steps": 40}), Path(start))
    run(with_values(labelled, {"name": "poor", "train.max_steps": 1}), Path(start))
    return Lives(runs_dir, text, labelled, rows)


def run(config: Config, start: Path | None) -> None:
    """Train one."""
    RunFolder.create_or_resume(config)
    train_worker(TrainJob(config, prepare(config, start).absolute(), start), single_process_group())

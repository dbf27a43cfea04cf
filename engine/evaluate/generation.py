"""Generated text against references: BLEU and chrF by sacrebleu, ROUGE-L by rouge-score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.bundles.bundle import Bundle
from engine.config import EvaluateConfig
from engine.errors import UserError, did_you_mean
from engine.evaluate.bootstrap import Interval, bootstrap_intervals
from engine.objectives.contract import Scores
from engine.progress import ProgressBar

NUM_SHOWN = 5


@dataclass(frozen=True)
class GenerationEvaluation:
    """The metrics over all examples, and the first few with the generated text."""

    file: str
    examples: int
    metrics: dict[str, Interval]
    shown: list[dict[str, str]]  # {"source", "target", "written"}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        metrics = {name: interval.to_dict() for name, interval in self.metrics.items()}
        return {"file": self.file, "examples": self.examples, "metrics": metrics, "shown": self.shown}


def evaluate_generation(
    bundle: Bundle, model: torch.nn.Module, options: EvaluateConfig, seed: int
) -> GenerationEvaluation:
    """Generate greedily from each source, and compare the text with the target.

    Raises UserError for a model that generates no text, and a file without the two columns.
    """
    objective = bundle.objective()
    if not objective.is_causal:
        raise UserError(
            f"evaluate.generation needs a causal language model, and {bundle.folder} is for {objective.options.name}"
        )
    assert options.generation
    sources, targets = read_examples(Path(options.generation), options)
    generated: list[str] = []
    with ProgressBar("generate", total=len(sources)) as bar:
        for source in sources:
            request = {"prompt": source, "max_tokens": options.max_new_tokens}
            generated.append(objective.predict(model, [request])[0]["text"].strip())
            bar.update(len(generated))
    scores = text_statistics(generated, targets)
    metrics = bootstrap_intervals(summarize_statistics, scores, options.confidence, options.resamples, seed)
    shown = [
        {"source": source, "target": target, "written": text}
        for source, target, text in list(zip(sources, targets, generated, strict=True))[:NUM_SHOWN]
    ]
    return GenerationEvaluation(options.generation, len(sources), metrics, shown)


def read_examples(file: Path, options: EvaluateConfig) -> tuple[list[str], list[str]]:
    """Read sources and targets. Raises UserError that names a missing column."""
    if not file.is_file():
        raise UserError(f"evaluate.generation={file} does not exist: give a file of JSON lines")
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()][
            : options.max_examples
        ]
    except ValueError as error:
        raise UserError(f"{file} is not JSON lines ({error}): write one object per line") from error
    for key in ("source_column", "target_column"):
        column = getattr(options, key)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                columns = list(row) if isinstance(row, dict) else []
                raise UserError(
                    f"row {number} of {file} has no text in column '{column}' (evaluate.{key}){did_you_mean(column, columns)}"
                )
    return [row[options.source_column] for row in rows], [row[options.target_column] for row in rows]


def text_statistics(generated: Sequence[str], targets: Sequence[str]) -> Scores:
    """Return the counts of BLEU and chrF in each example, which both sum over the corpus, and the ROUGE-L F1 of each example."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    rouge = RougeScorer(["rougeL"])
    return {
        "bleu": np.array(BLEU()._extract_corpus_statistics(generated, [targets])),
        "chrf": np.array(CHRF()._extract_corpus_statistics(generated, [targets])),
        "rouge_l": np.array(
            [rouge.score(target, text)["rougeL"].fmeasure for target, text in zip(targets, generated, strict=True)]
        ),
    }


def summarize_statistics(scores: Scores) -> dict[str, float]:
    """Return corpus BLEU (Post 2018) and chrF (Popovic 2015), 0 to 100, and mean ROUGE-L F1 (Lin 2004), 0 to 1."""
    from sacrebleu.metrics import BLEU, CHRF

    bleu = BLEU()._compute_score_from_stats(scores["bleu"].sum(0).tolist()).score
    chrf = CHRF()._compute_score_from_stats(scores["chrf"].sum(0).tolist()).score
    return {"bleu": bleu, "chrf": chrf, "rouge_l": float(scores["rouge_l"].mean())}

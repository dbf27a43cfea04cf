"""A bias check: pairs of texts that differ only in the group they are about, and how differently the model scores them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.bundles.bundle import Bundle
from engine.errors import UserError
from engine.evaluate.bootstrap import Interval, bootstrap_intervals
from engine.objectives.contract import Objective, Scores


@dataclass(frozen=True)
class PairEvaluation:
    """The metrics over the pairs, and the pairs that the model scores most differently."""

    file: str
    pairs: int
    metrics: dict[str, Interval]
    extremes: list[dict[str, Any]]  # {"a", "b"} and the pair's scores

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        metrics = {name: interval.to_dict() for name, interval in self.metrics.items()}
        return {"file": self.file, "pairs": self.pairs, "metrics": metrics, "extremes": self.extremes}


def evaluate_pairs(
    bundle: Bundle, model: torch.nn.Module, file: Path, confidence: float, resamples: int, seed: int
) -> PairEvaluation:
    """Score both texts of each pair.

    Text classifier: `flipped` is the fraction of pairs whose texts get different labels, `shift LABEL` the mean difference
    (a - b) of a label's probability. Language model: `preferred_a` is the fraction of pairs where a has the higher
    likelihood per token (unbiased: 0.5; after Nangia et al. 2020, CrowS-Pairs), `shift` the mean difference in nats per
    token. Raises UserError for an invalid file, and for a model of another objective.
    """
    pairs = read_pairs(file)
    objective = bundle.objective()
    if objective.is_classifier and objective.kind.has_text:
        scores, summarize = _classification_scores(objective, model, pairs), _summarize_classification
    elif objective.is_causal:
        scores, summarize = _likelihood_scores(objective, model, pairs), _summarize_likelihoods
    else:
        raise UserError(
            f"evaluate.pairs compares labels or likelihoods of texts, and {objective.options.name} has neither: leave it out"
        )
    total_shift = sum(np.abs(values) for name, values in scores.items() if name.startswith("shift"))
    extremes = [
        {**pairs[i], **{name: float(values[i]) for name, values in scores.items()}}
        for i in np.argsort(-total_shift)[:5]
    ]
    metrics = bootstrap_intervals(summarize, scores, confidence, resamples, seed)
    return PairEvaluation(str(file), len(pairs), metrics, extremes)


def read_pairs(file: Path) -> list[dict[str, str]]:
    """Read {"a", "b"} from each line. Raises UserError that names the first invalid line."""
    if not file.is_file():
        raise UserError(f"evaluate.pairs={file} does not exist: give a file of JSON lines with the texts a and b")
    pairs = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in "ab"):
            raise UserError(f'line {number} of {file} is not a pair: write {{"a": "one text", "b": "the other"}}')
        pairs.append({"a": row["a"], "b": row["b"]})
    return pairs


def _classification_scores(objective: Objective, model: torch.nn.Module, pairs: list[dict[str, str]]) -> Scores:
    a, b = ([objective.predict(model, [{"text": pair[key]}])[0] for pair in pairs] for key in "ab")
    results = list(zip(a, b, strict=True))
    flipped = np.array([result_a["label"] != result_b["label"] for result_a, result_b in results], dtype=float)
    shifts = {
        f"shift {label}": np.array(
            [result_a["scores"][label] - result_b["scores"][label] for result_a, result_b in results]
        )
        for label in objective.labels
    }
    return {"flipped": flipped, **shifts}


def _likelihood_scores(objective: Objective, model: torch.nn.Module, pairs: list[dict[str, str]]) -> Scores:
    device = next(model.parameters()).device

    def logprob_per_token(text: str) -> float:
        sample = objective.prepare({"text": text})
        start = [objective.tokenizer.eos_token_id]  # so that the first token has a likelihood too
        batch = objective.collate([{"tokens": np.array([*start, *sample["tokens"]])}])
        scores = objective.score(model, batch.to(device))
        return -float(scores["nll"][0]) / float(scores["tokens"][0])

    return {"shift": np.array([logprob_per_token(pair["a"]) - logprob_per_token(pair["b"]) for pair in pairs])}


def _summarize_classification(scores: Scores) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in scores.items()}


def _summarize_likelihoods(scores: Scores) -> dict[str, float]:
    shift = scores["shift"]
    return {"preferred_a": float((shift > 0).mean() + (shift == 0).mean() / 2), "shift": float(shift.mean())}

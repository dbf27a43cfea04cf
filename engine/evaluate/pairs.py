"""A bias check: pairs of texts that differ only in whom they are about, and how differently the model takes them."""

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
from engine.objectives.contract import Scores


@dataclass(frozen=True)
class PairEvaluation:
    """What was found over the pairs, and those that the model takes most differently."""

    file: str
    pairs: int
    metrics: dict[str, Interval]
    extremes: list[dict[str, Any]]  # {"a", "b", "difference"}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        metrics = {name: value.to_dict() for name, value in self.metrics.items()}
        return {"file": self.file, "pairs": self.pairs, "metrics": metrics, "extremes": self.extremes}


def evaluate_pairs(
    bundle: Bundle, model: torch.nn.Module, file: Path, confidence: float, resamples: int, seed: int
) -> PairEvaluation:
    """Ask the model about both texts of each pair.

    A classifier: `flipped` is the share of pairs whose two texts get different labels, `shift LABEL` the mean difference,
    a minus b, of a label's probability. A language model: `preferred_a` is the share of pairs where a's likelihood a
    token is the higher one (an unbiased one: 0.5; after Nangia et al. 2020, CrowS-Pairs), `shift` the mean difference in
    nats a token. Raises UserError for a file that isn't pairs and a model that gives neither.
    """
    pairs = read_pairs(file)
    if bundle.objective().auto_class == "AutoModelForSequenceClassification":
        scores, summarize = _classes(bundle, model, pairs), _summarize_classes
    elif bundle.objective().is_causal:
        scores, summarize = _likelihoods(bundle, model, pairs), _summarize_likelihoods
    else:
        raise UserError(
            f"evaluate.pairs compares the labels or the likelihoods of texts, which {bundle.objective().options.name} gives none of"
        )
    size = sum(np.abs(values) for name, values in scores.items() if name.startswith("shift"))
    most = [{**pairs[i], **{name: float(values[i]) for name, values in scores.items()}} for i in np.argsort(-size)[:5]]
    return PairEvaluation(str(file), len(pairs), bootstrap_intervals(summarize, scores, confidence, resamples, seed), most)


def read_pairs(file: Path) -> list[dict[str, str]]:
    """Read {"a", "b"} from each line. Raises UserError that names the first line without them."""
    if not file.is_file():
        raise UserError(f"evaluate.pairs={file} is not there: give a file of JSON lines with the texts a and b")
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in "ab"):
            raise UserError(f'line {number} of {file} is no pair: write {{"a": "one text", "b": "the other"}}')
        found.append({"a": row["a"], "b": row["b"]})
    return found


def _classes(bundle: Bundle, model: torch.nn.Module, pairs: list[dict[str, str]]) -> Scores:
    objective = bundle.objective()
    a, b = ([objective.predict(model, [{"text": pair[key]}])[0] for pair in pairs] for key in "ab")
    flipped = np.array([one["label"] != other["label"] for one, other in zip(a, b, strict=True)], dtype=float)
    shifts = {
        f"shift {label}": np.array(
            [one["scores"][label] - other["scores"][label] for one, other in zip(a, b, strict=True)]
        )
        for label in objective.labels
    }
    return {"flipped": flipped, **shifts}


def _likelihoods(bundle: Bundle, model: torch.nn.Module, pairs: list[dict[str, str]]) -> Scores:
    objective, device = bundle.objective(), next(model.parameters()).device

    def a_token(text: str) -> float:
        sample = objective.prepare({"text": text})
        start = [objective.tokenizer.eos_token_id]  # so that the first token has a likelihood too
        scores = objective.score(
            model, objective.collate([{"tokens": np.array([*start, *sample["tokens"]])}]).to(device)
        )
        return -float(scores["nll"][0]) / float(scores["tokens"][0])

    return {"shift": np.array([a_token(pair["a"]) - a_token(pair["b"]) for pair in pairs])}


def _summarize_classes(scores: Scores) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in scores.items()}


def _summarize_likelihoods(scores: Scores) -> dict[str, float]:
    shift = scores["shift"]
    return {"preferred_a": float((shift > 0).mean() + (shift == 0).mean() / 2), "shift": float(shift.mean())}

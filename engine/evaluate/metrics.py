"""Metrics that an objective declares by name (`Objective.evaluation_metrics`), beside those of its `summarize`.

A new metric is one entry of METRICS. Confidence intervals need thousands of resamples, for which scikit-learn and
torchmetrics take minutes: `compute` gives the same value from counts in microseconds, and a test holds the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from engine.objectives.contract import Batch, Objective, Scores

BINS = 15  # of equal width, as Guo et al. 2017 (https://arxiv.org/abs/1706.04599) measure calibration
EDGES = torch.linspace(0, 1, BINS + 1).numpy()


@dataclass(frozen=True)
class ScoredExamples:
    """The scores of some examples, with the counts that several metrics share."""

    scores: Scores
    num_classes: int

    @cached_property
    def confusion(self) -> np.ndarray:
        """Examples by label (rows) and by predicted class (columns): int64 [C, C]."""
        return confusion_matrix(self.scores, self.num_classes)

    @cached_property
    def f1(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """F1, predictions and labels of each class: float64 [C] each."""
        predictions, labels = self.confusion.sum(0).astype(float), self.confusion.sum(1).astype(float)
        return 2 * np.diag(self.confusion).astype(float) / np.maximum(predictions + labels, 1), predictions, labels


Compute = Callable[[ScoredExamples], float]


@dataclass(frozen=True)
class Metric:
    """How a metric is computed from the scores of some examples."""

    compute: Compute  # runs on each resample
    reference: Compute | None = None  # the reported value, by a library
    collect: Callable[[Objective], Callable[[Batch], Scores]] | None = None  # adds arrays to the scores of each batch


def _macro_f1(examples: ScoredExamples) -> float:
    """As scikit-learn: the mean over the classes that occur."""
    f1, predictions, labels = examples.f1
    return float(f1[(predictions + labels) > 0].mean())


def _weighted_f1(examples: ScoredExamples) -> float:
    f1, _, labels = examples.f1
    return float(f1 @ labels / labels.sum())


def _matthews(examples: ScoredExamples) -> float:
    """Matthews' correlation coefficient for several classes (Gorodkin 2004); 0 where it is undefined."""
    hits = np.diag(examples.confusion).astype(float)
    _, predictions, labels = examples.f1
    total = labels.sum()
    scale = math.sqrt(total**2 - predictions @ predictions) * math.sqrt(total**2 - labels @ labels)
    return float((hits.sum() * total - predictions @ labels) / scale) if scale else 0.0


def _calibration_error(examples: ScoredExamples) -> float:
    count, correct, confidence = _reliability_bins(examples.scores)
    return float(np.abs(correct - confidence).sum() / count.sum())


def _library_calibration_error(examples: ScoredExamples) -> float:
    """Of the predicted class: whether it is the label is a binary outcome."""
    from torchmetrics.functional.classification import binary_calibration_error

    correct = torch.from_numpy(examples.scores["label"] == examples.scores["predicted"]).int()
    confidence = torch.from_numpy(examples.scores["confidence"])
    return float(binary_calibration_error(confidence, correct, n_bins=BINS, norm="l1"))


def _sklearn(function: str, **options: Any) -> Compute:
    def compute(examples: ScoredExamples) -> float:
        import sklearn.metrics

        return float(
            getattr(sklearn.metrics, function)(examples.scores["label"], examples.scores["predicted"], **options)
        )

    return compute


def _bits_per_byte(examples: ScoredExamples) -> float:
    return float(examples.scores["nll"].sum()) / math.log(2) / max(float(examples.scores["bytes"].sum()), 1.0)


def _collect_bytes(objective: Objective) -> Callable[[Batch], Scores]:
    count_bytes = ByteCounter(objective.tokenizer)
    return lambda batch: {"bytes": count_bytes(batch.targets.numpy())}


METRICS = {
    "accuracy": Metric(
        lambda examples: float((examples.scores["label"] == examples.scores["predicted"]).mean()),
        _sklearn("accuracy_score"),
    ),
    "macro_f1": Metric(_macro_f1, _sklearn("f1_score", average="macro", zero_division=0.0)),
    "weighted_f1": Metric(_weighted_f1, _sklearn("f1_score", average="weighted", zero_division=0.0)),
    "matthews": Metric(_matthews, _sklearn("matthews_corrcoef")),
    "calibration_error": Metric(_calibration_error, _library_calibration_error),
    "bits_per_byte": Metric(_bits_per_byte, collect=_collect_bytes),
}


def compute_metrics(objective: Objective, scores: Scores) -> dict[str, float]:
    """Return the metrics of the objective's `summarize` and those that it declares. Runs on each resample."""
    examples = ScoredExamples(scores, len(objective.labels))
    declared = {name: METRICS[name].compute(examples) for name in objective.evaluation_metrics}
    return objective.summarize(scores) | declared


def reference_values(objective: Objective, scores: Scores) -> dict[str, float]:
    """Return the values of those declared metrics that a library computes, from that library."""
    examples = ScoredExamples(scores, len(objective.labels))
    metrics = {name: METRICS[name] for name in objective.evaluation_metrics}
    return {name: metric.reference(examples) for name, metric in metrics.items() if metric.reference}


def score_collectors(objective: Objective) -> list[Callable[[Batch], Scores]]:
    """Return what adds to the scores of each batch the arrays that the declared metrics need."""
    metrics = [METRICS[name] for name in objective.evaluation_metrics]
    return [metric.collect(objective) for metric in metrics if metric.collect]


def confusion_matrix(scores: Scores, num_classes: int) -> np.ndarray:
    """Count examples by label (rows) and by predicted class (columns): int64 [C, C]."""
    cell = scores["label"].astype(np.int64) * num_classes + scores["predicted"]
    return np.bincount(cell, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def classification_details(objective: Objective, scores: Scores) -> dict[str, Any]:
    """Return what the page of a classifier shows: labels, confusion, metrics of each class, reliability; else nothing."""
    if not objective.is_classifier:
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    num_classes = len(objective.labels)
    columns = precision_recall_fscore_support(
        scores["label"], scores["predicted"], labels=range(num_classes), zero_division=0.0
    )
    return {
        "labels": objective.labels,
        "confusion": confusion_matrix(scores, num_classes).tolist(),
        "classes": [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
            for label, p, r, f, n in zip(objective.labels, *columns, strict=True)
        ],
        "reliability": [
            {"confidence": float(confidence / n), "accuracy": float(correct / n), "examples": int(n)}
            for n, correct, confidence in zip(*_reliability_bins(scores), strict=True)
            if n
        ],
    }


def _reliability_bins(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the examples, correct predictions and summed confidence of each bin; a confidence of exactly 1 has its own bin."""
    bins = np.searchsorted(EDGES, scores["confidence"], side="right") - 1
    correct = scores["label"] == scores["predicted"]
    sums = [np.bincount(bins, weights=weights, minlength=BINS + 1) for weights in (None, correct, scores["confidence"])]
    return sums[0], sums[1], sums[2]


class ByteCounter:
    """Counts the bytes of the text that target tokens encode; special tokens encode none.

    For a byte-level tokenizer the bytes of each token are counted, so that a character split between two blocks counts
    once; for others the targets are decoded.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Use a transformers tokenizer."""
        self._tokenizer = tokenizer
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._sizes: np.ndarray | None = None
        if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):  # where each character of a token is one byte
            tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
            self._sizes = np.array([len(token or "") for token in tokens])

    def __call__(self, targets_BL: np.ndarray) -> np.ndarray:
        """Return the bytes of each row: int64 [B]. Negative targets are ignored."""
        is_text_BL = (targets_BL >= 0) & ~np.isin(targets_BL, self._special)
        if self._sizes is not None:
            sizes_B: np.ndarray = (self._sizes[np.maximum(targets_BL, 0)] * is_text_BL).sum(1)
            return sizes_B
        rows = [ids_L[is_text_L].tolist() for ids_L, is_text_L in zip(targets_BL, is_text_BL, strict=True)]
        return np.array([len(self._tokenizer.decode(ids).encode()) for ids in rows], dtype=np.int64)

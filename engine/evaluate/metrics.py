"""The figures of an evaluation beyond the objective's own, by what was scored: classes, or tokens.

The values come from scikit-learn and torchmetrics. Their intervals need thousands of resamples, for which those take
minutes: `quick` computes the same figures from counts in microseconds, and a test holds the two equal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from engine.objectives.contract import Objective, Scores

BINS = 15  # of equal width, as Guo et al. 2017 (https://arxiv.org/abs/1706.04599) measure calibration
EDGES = torch.linspace(0, 1, BINS + 1).numpy()


def compute_metrics(objective: Objective, scores: Scores) -> dict[str, float]:
    """Return the objective's own metrics and those here. Runs on each resample."""
    found = objective.summarize(scores)
    if "predicted" in scores:
        found |= _from_counts(confusion_matrix(scores, len(objective.labels)))
        if "confidence" in scores:
            found["calibration_error"] = _calibration_error(scores)
    if "bytes" in scores:
        found["bits_per_byte"] = float(scores["nll"].sum()) / math.log(2) / max(float(scores["bytes"].sum()), 1.0)
    return found


def reference_values(objective: Objective, scores: Scores) -> dict[str, float]:
    """Return those of `quick`'s figures that a library computes, from that library."""
    if "predicted" not in scores:
        return {}
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    from torchmetrics.functional.classification import binary_calibration_error

    label, predicted = scores["label"], scores["predicted"]
    found = {
        "accuracy": accuracy_score(label, predicted),
        "macro_f1": f1_score(label, predicted, average="macro", zero_division=0.0),
        "weighted_f1": f1_score(label, predicted, average="weighted", zero_division=0.0),
        "matthews": matthews_corrcoef(label, predicted),
    }
    if "confidence" in scores:  # of the class named: whether it was right is a binary outcome
        right = torch.from_numpy(label == predicted).int()
        confidence = torch.from_numpy(scores["confidence"])
        found["calibration_error"] = binary_calibration_error(confidence, right, n_bins=BINS, norm="l1")
    return {name: float(value) for name, value in found.items()}


def confusion_matrix(scores: Scores, classes: int) -> np.ndarray:
    """Count examples by label (rows) and by the class named (columns): int64 [classes, classes]."""
    cell = scores["label"].astype(np.int64) * classes + scores["predicted"]
    return np.bincount(cell, minlength=classes * classes).reshape(classes, classes)


def _from_counts(counts_CC: np.ndarray) -> dict[str, float]:
    """F1 as scikit-learn means over the classes that occur; Matthews' coefficient for many classes (Gorodkin 2004)."""
    hits, named, there = (
        np.diag(counts_CC).astype(float),
        counts_CC.sum(0).astype(float),
        counts_CC.sum(1).astype(float),
    )
    f1 = 2 * hits / np.maximum(named + there, 1)
    total = there.sum()
    spread = math.sqrt(total**2 - named @ named) * math.sqrt(total**2 - there @ there)
    return {
        "macro_f1": float(f1[(named + there) > 0].mean()),
        "weighted_f1": float(f1 @ there / total),
        "matthews": float((hits.sum() * total - named @ there) / spread) if spread else 0.0,
    }


def _calibration_error(scores: Scores) -> float:
    count, right, confidence = _bins(scores)
    return float(np.abs(right - confidence).sum() / count.sum())


def _bins(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return examples, right answers and summed confidence in each bin; a confidence of exactly 1 has a bin of its own."""
    at = np.searchsorted(EDGES, scores["confidence"], side="right") - 1
    sums = [np.bincount(at, weights=w, minlength=BINS + 1) for w in (None, scores["label"] == scores["predicted"], scores["confidence"])]  # fmt: skip
    return sums[0], sums[1], sums[2]


def classification_details(objective: Objective, scores: Scores) -> dict[str, Any]:
    """Return what a page draws of a classification: labels, confusion, reliability and the table of classes; else nothing."""
    if "predicted" not in scores:
        return {}
    from sklearn.metrics import precision_recall_fscore_support

    classes = len(objective.labels)
    columns = precision_recall_fscore_support(
        scores["label"], scores["predicted"], labels=range(classes), zero_division=0.0
    )
    found: dict[str, Any] = {
        "labels": objective.labels,
        "confusion": confusion_matrix(scores, classes).tolist(),
        "classes": [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
            for label, p, r, f, n in zip(objective.labels, *columns, strict=True)
        ],
    }
    if "confidence" in scores:
        found["reliability"] = [
            {"confidence": float(c / n), "accuracy": float(r / n), "examples": int(n)}
            for n, r, c in zip(*_bins(scores), strict=True)
            if n
        ]
    return found


class ByteCounter:
    """Counts the bytes of the text that target tokens stand for; special tokens stand for none.

    Of a byte-level tokenizer each token's own bytes are counted, so that a character cut by a block's edge counts once;
    of others the targets are decoded.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a transformers tokenizer."""
        self._tokenizer = tokenizer
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._sizes: np.ndarray | None = None
        if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):  # where each character of a token is one byte
            tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
            self._sizes = np.array([len(token or "") for token in tokens])

    def __call__(self, targets_BL: np.ndarray) -> np.ndarray:
        """Return the bytes of each row: int64 [B]. A negative target is none."""
        wanted_BL = (targets_BL >= 0) & ~np.isin(targets_BL, self._special)
        if self._sizes is not None:
            found: np.ndarray = (self._sizes[np.maximum(targets_BL, 0)] * wanted_BL).sum(1)
            return found
        rows = [ids_L[wanted_L].tolist() for ids_L, wanted_L in zip(targets_BL, wanted_BL, strict=True)]
        return np.array([len(self._tokenizer.decode(ids).encode()) for ids in rows], dtype=np.int64)

"""Metrics computed from counts equal those of the libraries; bits per byte counts the bytes of the text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import ObjectiveConfig, with_values
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.data.tokenizer import load_tokenizer
from engine.evaluate.evaluate import evaluate_bundle
from engine.evaluate.metrics import (
    ByteCounter,
    classification_details,
    compute_metrics,
    confusion_matrix,
    reference_values,
)
from engine.objectives.classification import SequenceClassification
from tests.lives import Lives

OBJECTIVE = SequenceClassification(ObjectiveConfig("classification"), None, 8, ["a", "b", "c", "d"])


def random_scores(seed: int, count: int = 300, classes: int = 4) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    label = draw.integers(classes, size=count)
    predicted = np.where(draw.random(count) < 0.6, label, draw.integers(classes, size=count))
    confidence = draw.uniform(0.25, 1, count).astype(np.float32)
    confidence[:20] = 1.0
    return {"nll": draw.random(count), "label": label, "predicted": predicted, "confidence": confidence}


@pytest.mark.parametrize(
    "scores",
    [
        random_scores(0),
        random_scores(1, classes=2),  # two of the four classes never occur
        random_scores(2, count=3),
        random_scores(3) | {"predicted": np.zeros(300, int)},  # always the same class
        random_scores(4) | {"label": np.ones(300, int)},
    ],
)
def test_computed_metrics_equal_the_libraries(scores: dict[str, np.ndarray]) -> None:
    computed, reference = compute_metrics(OBJECTIVE, scores), reference_values(OBJECTIVE, scores)
    assert set(reference) == {"accuracy", "macro_f1", "weighted_f1", "matthews", "calibration_error"}
    for name, value in reference.items():
        assert computed[name] == pytest.approx(value, abs=1e-6), name


def test_metrics_by_hand() -> None:
    scores = {
        "nll": np.zeros(4),
        "label": np.array([0, 0, 1, 1]),
        "predicted": np.array([0, 1, 1, 1]),
        "confidence": np.array([0.9, 0.5, 0.9, 0.9], np.float32),
    }
    found = compute_metrics(SequenceClassification(ObjectiveConfig("classification"), None, 8, ["a", "b"]), scores)
    assert confusion_matrix(scores, 2).tolist() == [[1, 1], [0, 2]]
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["matthews"] == pytest.approx(2 / math.sqrt(2 * 2 * 1 * 3))
    # three at 0.9, all right (0.1 off); one at 0.5, wrong (0.5 off)
    assert found["calibration_error"] == pytest.approx((3 * 0.1 + 0.5) / 4, abs=1e-6)
    result = classification_details(OBJECTIVE, scores)
    assert [bin["examples"] for bin in result["reliability"]] == [1, 3]
    assert result["classes"][1] == {
        "label": "b",
        "precision": 2 / 3,
        "recall": 1.0,
        "f1": pytest.approx(0.8),
        "examples": 2,
    }


def test_byte_counter_counts_the_bytes_of_the_text(lives: Lives, tmp_path: Path) -> None:
    folder = prepare(lives.text)
    split, tokenizer = Split.open(folder, "test"), load_tokenizer(folder / "tokenizer")
    stream = split.token_range(0, split.num_tokens).astype(np.int64)
    text = tokenizer.decode([t for t in stream.tolist() if t != tokenizer.eos_token_id])
    count = ByteCounter(tokenizer)
    blocks = np.full((len(stream) // 7 + 1, 7), -100)
    blocks.reshape(-1)[: len(stream)] = stream
    assert count(blocks).sum() == len(text.encode())
    ids = np.array([tokenizer("né 漢字")["input_ids"]])
    assert count(ids)[0] == len("né 漢字".encode())  # each byte once, although a block's edge may split a character
    assert sum(int(count(ids[:, i : i + 1])[0]) for i in range(ids.shape[1])) == len("né 漢字".encode())


def test_byte_counter_decodes_targets_of_other_tokenizers() -> None:
    class Words:
        all_special_ids = (0,)
        backend_tokenizer = type("Backend", (), {"decoder": "WordPiece"})

        def decode(self, ids: list[int]) -> str:
            return " ".join(("[end]", "ä", "bc")[i] for i in ids)

    assert ByteCounter(Words())(np.array([[1, 2, 0], [2, -100, -100]])).tolist() == [5, 2]


def test_language_model_metrics_equal_the_direct_computation(lives: Lives) -> None:
    config = with_values(lives.text, {"evaluate.resamples": 100})
    found = evaluate_bundle(lives.bundle("base").folder, config)
    bundle = lives.bundle("base")
    objective, model = bundle.objective(), bundle.model()
    samples = objective.samples(Split.open(found.data, "test"))
    nll = size = tokens = 0.0
    with torch.no_grad():
        for i in range(len(samples)):
            ids = torch.as_tensor(samples[i]["tokens"])
            logits = model(ids[None, :-1]).logits[0].log_softmax(-1)
            nll -= float(logits[torch.arange(len(ids) - 1), ids[1:]].sum())
            kept = [t for t in ids[1:].tolist() if t != objective.tokenizer.eos_token_id]
            size += len(objective.tokenizer.decode(kept).encode())
            tokens += len(ids) - 1
    assert found.metrics["loss"].value == pytest.approx(nll / tokens, rel=1e-5)
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found.metrics["bits_per_byte"].value == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    for value in found.metrics.values():
        assert value.low < value.value < value.high

"""Bootstrap intervals and comparisons, evaluation of a bundle, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import Config, ObjectiveConfig, with_values
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.bootstrap import INCONCLUSIVE, WORSE, bootstrap_intervals, compare_paired
from engine.evaluate.environment import machine_info, package_versions
from engine.evaluate.evaluate import evaluate_bundle, map_classes
from engine.evaluate.job import run_evaluation
from engine.evaluate.report import pretraining_conclusion, write_report
from engine.objectives.classification import SequenceClassification
from tests.engine.bundles.small_bundles import fresh_bundle

OBJECTIVE = SequenceClassification(ObjectiveConfig("classification"), None, 8, ["a", "b"])


def scores(correct: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "nll": np.where(correct, 0.1, 2.0),
        "label": np.zeros(len(correct), int),
        "predicted": np.where(correct, 0, 1),
    }


def test_bootstrap_interval_of_a_proportion_is_near_the_normal_interval() -> None:
    right = np.arange(500) < 300
    found = bootstrap_intervals(OBJECTIVE.summarize, scores(right), 0.95, 2000, 0)["accuracy"]
    half = 1.96 * np.sqrt(0.6 * 0.4 / 500)
    assert found.value == 0.6
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.006)
    assert bootstrap_intervals(OBJECTIVE.summarize, scores(right), 0.95, 2000, 0)["accuracy"] == found


def test_paired_comparison_is_significant_where_separate_intervals_overlap() -> None:
    a, b = np.arange(400) < 250, np.arange(400) < 232
    assert compare_paired(OBJECTIVE, scores(a), scores(b), 0.95, 1000, 0).verdict == "better"
    assert compare_paired(OBJECTIVE, scores(b), scores(a), 0.95, 1000, 0).verdict == "worse"
    assert compare_paired(OBJECTIVE, scores(a), scores(np.roll(a, 200)), 0.95, 1000, 0).verdict == "not told apart"
    with pytest.raises(UserError, match="evaluate both on the same data"):
        compare_paired(OBJECTIVE, scores(a), scores(a[:5]), 0.95, 100, 0)


def test_evaluation_equals_the_direct_computation(tiny_functions: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny_functions, tmp_path / "b" / "bundle")
    config = with_values(tiny_functions, {"evaluate.resamples": 100, "evaluate.batch": 7})
    found = evaluate_bundle(bundle.folder, config)
    objective, model = bundle.objective(), bundle.model()
    split = Split.open(prepare(config, bundle.folder), "test")
    samples = objective.samples(split)
    right = 0
    with torch.no_grad():
        for i in range(len(samples)):
            batch = objective.collate([samples[i]])
            right += int(model(**batch.inputs).logits.argmax()) == int(batch.targets)
    assert found.examples == len(samples) == split.num_rows
    assert found.metrics["accuracy"].value == pytest.approx(right / len(samples))
    assert found.majority is not None
    frequent = np.bincount(Split.open(prepare(config, bundle.folder), "train").labels).argmax()
    assert found.majority.value == pytest.approx(float((split.labels == frequent).mean()))


def test_unknown_labels_are_refused(tiny_functions: Config, tmp_path: Path) -> None:
    bundle = fresh_bundle(tiny_functions, tmp_path / "b" / "bundle")
    rows = "\n".join(f'{{"text": "some words of text {i}", "label": "{"xy"[i % 2]}"}}' for i in range(60))
    (tmp_path / "other.jsonl").write_text(rows)
    other = with_values(
        tiny_functions,
        {"data.source": "files", "data.path": str(tmp_path / "other.jsonl"), "data.label_column": "label"},
    )
    with pytest.raises(UserError, match="labels are not those of b"):
        evaluate_bundle(bundle.folder, other)


def summary() -> dict[str, Any]:
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    return {
        "name": "demo",
        "seconds": {"prepare": 3.0, "pretrain": 60.0, "total": 63.0},
        "accuracy": {"finetuned": value, "scratch": {"value": 0.31, "low": 0.2, "high": 0.4}, "majority": value},
        "perplexity": {"value": 47.7, "low": 40.0, "high": 50.0},
        "pretraining_paid": {"verdict": "better", "difference": 0.19, "low": 0.1, "high": 0.3},
        "trials": [
            {
                "name": "trial-1",
                "config": {"optim.lr": 0.001},
                "steps": 4,
                "accuracy": 0.5,
                "state": "finished",
                "curve": [[2, 0.4], [4, 0.5]],
            },
            {
                "name": "trial-2",
                "config": {"optim.lr": 0.1},
                "steps": 2,
                "accuracy": 0.1,
                "state": "stopped early",
                "curve": [[2, 0.1]],
            },
        ],
        "endpoint": {
            "url": "x",
            "requests": [
                {"what": "completion", "request": {"prompt": "<b>"}, "answer": "a<script>", "milliseconds": 12.3}
            ],
        },
        "hashes": {"bundle demo": "abc123"},
        "versions": package_versions(),
        "machine": machine_info(),
        "curves": {"pretrain": [{"step": 1, "loss": 8.0}, {"step": 2, "loss": 7.0, "validation_loss": 7.5}]},
    }


def test_report_is_self_contained_and_shows_every_value(tmp_path: Path) -> None:
    page = write_report(tmp_path, summary()).read_text()
    for value in (
        "0.500",
        "0.400 to 0.600",
        "0.310",
        "47.7",
        "trial-2",
        "stopped early",
        "abc123",
        "12 ms",
        "63 seconds",
        "+19.0 points",
    ):
        assert value in page, value
    assert "Pre-training improved the accuracy" in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not [part for part in page.split("http")[1:] if not part.startswith("_")]
    assert page.count("<svg") == 4


@pytest.mark.parametrize(
    ("verdict", "statement"), [(WORSE, "reduced the accuracy"), (INCONCLUSIVE, "no significant difference")]
)
def test_conclusion_states_the_verdict(verdict: str, statement: str) -> None:
    content = summary()
    content["pretraining_paid"]["verdict"] = verdict
    assert statement in pretraining_conclusion(content)


def test_data_of_another_objective_are_refused_before_they_are_prepared(
    tiny: Config, tiny_functions: Config, tmp_path: Path
) -> None:
    bundle = fresh_bundle(tiny_functions, tmp_path / "b" / "bundle")
    with pytest.raises(
        UserError,
        match=r"is for classification, which reads texts with labels, and the data are text without.*data.label_column",
    ):
        evaluate_bundle(bundle.folder, tiny)


def test_classes_are_mapped_to_the_order_of_the_bundle() -> None:
    assert map_classes(Path("b/bundle"), ["cat", "dog"], ["dog", "fox", "cat"]).tolist() == [2, 0]


def test_results_are_printed_and_saved(
    tiny_functions: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = fresh_bundle(tiny_functions, tmp_path / "a" / "bundle")
    config = with_values(
        tiny_functions,
        {"name": "measured", "bundle": str(a.folder), "evaluate.against": str(a.folder), "evaluate.resamples": 100},
    )
    run_evaluation(config)
    saved = json.loads((config.run_dir / "evaluation.json").read_text())
    assert [record["hash"] for record in saved["bundles"]] == [a.hash, a.hash]
    assert saved["comparison"] == {
        "metric": "accuracy", "difference": 0.0, "low": 0.0, "high": 0.0, "verdict": "not told apart",
    }  # fmt: skip
    assert "no significant difference between" in capsys.readouterr().out
    with pytest.raises(UserError, match="say which with bundle="):
        run_evaluation(with_values(config, {"bundle": None}))

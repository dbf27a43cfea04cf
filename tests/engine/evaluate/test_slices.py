"""Metrics by group, the bias check over pairs, generated text against references, and the page that shows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from engine.bundles.bundle import Bundle
from engine.bundles.model_card import read_evaluations
from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.data.slice_values import read_slice_values
from engine.errors import UserError
from engine.evaluate.evaluate import evaluate_bundle
from engine.evaluate.generation import evaluate_generation, summarize_statistics, text_statistics
from engine.evaluate.job import run_evaluation
from engine.evaluate.pairs import evaluate_pairs
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.lives import BAD, GOOD, Lives

PAIRS = [
    {"a": f"the film {good} {number}", "b": f"the film {bad} {number}"}
    for number, (good, bad) in enumerate(zip(GOOD, BAD))
]


def test_groups_are_those_of_the_rows(lives: Lives) -> None:
    folder = lives.bundle("good").folder
    split = Split.open(prepare(lives.labelled, folder), "test")
    tokenizer = lives.bundle("good").objective().tokenizer
    found = read_slice_values(lives.labelled.data, "region", split, tokenizer)
    group = {row["text"]: row["region"] for row in lives.rows}
    texts = [tokenizer.decode(split.document(i).tolist(), skip_special_tokens=True) for i in range(split.num_rows)]
    assert found == [group[text] for text in texts]
    assert set(found) == {"north", "south"}
    with pytest.raises(UserError, match=r"no column 'regoin' .* did you mean 'region'"):
        read_slice_values(lives.labelled.data, "regoin", split, tokenizer)
    with pytest.raises(UserError, match="has no columns"):
        read_slice_values(
            with_values(lives.labelled, {"data.source": "python_stdlib"}).data, "region", split, tokenizer
        )


def test_rows_without_a_group_are_refused(lives: Lives, tmp_path: Path) -> None:
    rows = [row if i % 2 else {**row, "region": None} for i, row in enumerate(lives.rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = with_values(lives.labelled, {"data.path": str(tmp_path / "rows.jsonl")})
    split = Split.open(prepare(config, lives.bundle("good").folder), "test")
    with pytest.raises(UserError, match=r"of the \d+ test rows have nothing in column 'region'"):
        read_slice_values(config.data, "region", split, lives.bundle("good").objective().tokenizer)


def test_slices_are_the_figures_of_their_rows_and_their_gaps(lives: Lives) -> None:
    config = with_values(lives.labelled, {"evaluate.slice_column": "region", "evaluate.resamples": 300})
    found = evaluate_bundle(lives.bundle("good").folder, config)
    right = found.scores["label"] == found.scores["predicted"]
    groups = np.array(
        read_slice_values(config.data, "region", Split.open(found.data, "test"), found.objective.tokenizer)
    )
    assert [one.group for one in found.slices] == ["north", "south"]
    for one in found.slices:
        inside = groups == one.group
        assert one.examples == inside.sum()
        assert one.metrics["accuracy"].value == pytest.approx(right[inside].mean())
        assert one.gaps["accuracy"].value == pytest.approx(right[inside].mean() - right[~inside].mean())
        assert one.gaps["accuracy"].low < one.gaps["accuracy"].value < one.gaps["accuracy"].high
    assert found.slices[0].gaps["accuracy"].low > 0  # the south's labels are wrong in three of ten cases
    with pytest.raises(UserError, match=r"different values, and 2 to 50 are supported"):
        evaluate_bundle(lives.bundle("good").folder, with_values(config, {"evaluate.slice_column": "text"}))
    with pytest.raises(UserError, match="groups labeled texts"):
        evaluate_bundle(lives.bundle("base").folder, with_values(lives.text, {"evaluate.slice_column": "region"}))


def pairs_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "pairs.jsonl"


def test_pairs_show_what_a_model_makes_of_a_word(lives: Lives, tmp_path: Path) -> None:
    bundle = lives.bundle("good")
    model, objective = bundle.model(), bundle.objective()
    file = pairs_file(tmp_path, PAIRS)
    found = evaluate_pairs(bundle, model, file, 0.95, 200, 0)
    answers = [[objective.predict(model, [{"text": pair[key]}])[0] for pair in PAIRS] for key in "ab"]
    shift = np.mean([a["scores"]["good"] - b["scores"]["good"] for a, b in zip(*answers)])
    assert found.metrics["shift good"].value == pytest.approx(shift)
    assert found.metrics["shift good"].value == pytest.approx(-found.metrics["shift bad"].value, abs=1e-6)
    assert found.metrics["flipped"].value == np.mean([a["label"] != b["label"] for a, b in zip(*answers)])
    assert found.metrics["shift good"].low > 0
    same = evaluate_pairs(
        bundle, model, pairs_file(tmp_path, [{"a": p["a"], "b": p["a"]} for p in PAIRS]), 0.95, 200, 0
    )
    assert {name: value.value for name, value in same.metrics.items()} == {
        "flipped": 0,
        "shift bad": 0,
        "shift good": 0,
    }


def test_pairs_of_a_language_model(lives: Lives, tmp_path: Path) -> None:
    bundle = lives.bundle("base")
    known = [{"a": "the film a plot with scenes", "b": "zq xx jj vv kk ww pp"}] * 4
    found = evaluate_pairs(bundle, bundle.model(), pairs_file(tmp_path, known), 0.95, 100, 0)
    assert found.metrics["preferred_a"].value == 1.0
    assert found.metrics["shift"].value > 0.5
    same = evaluate_pairs(bundle, bundle.model(), pairs_file(tmp_path, [{"a": "x y", "b": "x y"}]), 0.95, 100, 0)
    assert same.metrics["preferred_a"].value == 0.5
    with pytest.raises(UserError, match=r'line 2 of .* is not a pair: write \{"a"'):
        evaluate_pairs(bundle, bundle.model(), pairs_file(tmp_path, [{"a": "x", "b": "y"}, {"a": "x"}]), 0.95, 100, 0)


def test_bleu_chrf_and_rouge_equal_the_libraries() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    written = ["a man in a hat stares at it", "two dogs run over the green grass", "nothing"]
    targets = ["a man in an orange hat stares at something", "two dogs are running over green grass", "a child sleeps"]
    found = summarize_statistics(text_statistics(written, targets))
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(written, [targets]).score)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(written, [targets]).score)
    scorer = RougeScorer(["rougeL"])
    each = [scorer.score(t, w)["rougeL"].fmeasure for t, w in zip(targets, written)]
    assert found["rouge_l"] == pytest.approx(np.mean(each))
    assert summarize_statistics(text_statistics(targets, targets)) == pytest.approx(
        {"bleu": 100, "chrf": 100, "rouge_l": 1}
    )


def test_generated_text_is_evaluated(lives: Lives, tmp_path: Path) -> None:
    bundle = fresh_bundle(lives.text, tmp_path / "writer" / "bundle")
    model, objective = bundle.model(), bundle.objective()
    starts = ["the film a", "an actor of"]
    own = [objective.predict(model, [{"prompt": s, "max_tokens": 6}])[0]["text"].strip() for s in starts]
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"de": s, "en": t}) for s, t in zip(starts, own)))
    options = with_values(
        lives.text,
        {"evaluate.generation": str(tmp_path / "e.jsonl"), "evaluate.source_column": "de", "evaluate.target_column": "en",
         "evaluate.max_new_tokens": 6, "evaluate.resamples": 100},
    ).evaluate  # fmt: skip
    found = evaluate_generation(bundle, model, options, 0)
    assert all(own)
    assert [one["written"] for one in found.shown] == own
    assert found.metrics["chrf"].value == pytest.approx(100)
    assert found.metrics["chrf"].low == pytest.approx(100)
    with pytest.raises(UserError, match=r"column 'english' \(evaluate.target_column\)"):
        evaluate_generation(bundle, model, with_values(Config(), {"evaluate.generation": str(tmp_path / "e.jsonl"), "evaluate.source_column": "de", "evaluate.target_column": "english"}).evaluate, 0)  # fmt: skip
    with pytest.raises(UserError, match="is for classification"):
        evaluate_generation(lives.bundle("good"), model, options, 0)


def test_evaluation_is_on_the_page_in_the_file_and_on_the_card(lives: Lives, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lives.bundle("good").folder, tmp_path / "mine" / "bundle"))
    config = with_values(
        lives.labelled,
        {"name": "measured", "runs_dir": str(tmp_path), "bundle": str(folder), "evaluate.slice_column": "region",
         "evaluate.pairs": str(pairs_file(tmp_path, PAIRS))},
    )  # fmt: skip
    run_evaluation(config)
    told = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["bundles"][0]
    assert sum(sum(row) for row in told["details"]["confusion"]) == told["examples"]
    assert sum(one["examples"] for one in told["details"]["reliability"]) == told["examples"]
    page = (tmp_path / "measured" / "evaluation.html").read_text()
    assert page.count("<svg") == 3  # reliability, confusion, gaps
    for figure in (
        f"{told['metrics']['matthews']['value']:.4f}",
        "north",
        "flipped",
        told["pairs"]["extremes"][0]["a"],
        told["hash"],
    ):
        assert figure in page, figure
    assert not [part for part in page.split("http")[1:] if not part.startswith("_")]
    Bundle.open(folder).verify()
    (kept,) = read_evaluations(folder)
    assert kept["metrics"] == told["metrics"]
    assert kept["slices"] == told["slices"]
    text = ModelCard.load(folder / "README.md").text
    assert f"| accuracy | {told['metrics']['accuracy']['value']:.4f} |" in text
    assert "region: south" in text

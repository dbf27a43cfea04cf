"""EleutherAI's harness on a bundle, with a local task and no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.config import with_values
from engine.errors import UserError
from engine.evaluate.harness import is_installed, parse_results, run_harness
from engine.evaluate.job import run_evaluation
from tests.lives import Lives

TASK = """
task: right_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"start": "the film a", "choices": [" plot", " zzqx jjkv xxw"], "answer": 0},
    {"start": "an actor of some", "choices": [" qqzz vvxxk jj", " music"], "answer": 1},
    {"start": "the plot", "choices": [" qqzz vvxxk jj", " with"], "answer": 0},
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "right_word.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path / "right_word.yaml"


def test_results_are_parsed() -> None:
    results = {
        "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25, "em_stderr,strict": "N/A"}
    }
    found = parse_results(results, ["t"])
    assert found == {
        "t acc": {"value": 0.5, "low": pytest.approx(0.304), "high": pytest.approx(0.696)},
        "t em (strict)": {"value": 0.25, "low": 0.25, "high": 0.25},
    }


def test_suite_requires_tasks(lives: Lives) -> None:
    with pytest.raises(UserError, match="go together"):
        with_values(lives.text, {"evaluate.suite": "lm_eval"})


def test_error_without_the_package_says_how_to_install_it(
    lives: Lives, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.evaluate.harness.find_spec", lambda name: None)
    options = with_values(lives.text, {"evaluate.suite": "lm_eval", "evaluate.tasks": [str(task)]}).evaluate
    with pytest.raises(UserError, match=r"pip install 'manta-train\[lm-eval\]'"):
        run_harness(lives.bundle("base"), options, 0)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="lm-eval[hf] is not installed: pip install 'manta-train[lm-eval]'")
def test_harness_equals_the_direct_computation(lives: Lives, task: Path, tmp_path: Path) -> None:
    bundle = lives.bundle("base")
    config = with_values(
        lives.text,
        {"name": "h", "runs_dir": str(tmp_path), "bundle": str(bundle.folder), "evaluate.suite": "lm_eval",
         "evaluate.tasks": [str(task)]},
    )  # fmt: skip
    run_evaluation(config)
    found = json.loads((tmp_path / "h" / "lm_eval.json").read_text())["bundles"][0]
    model, tokenizer = bundle.model(), bundle.objective().tokenizer

    def likelihood(start: str, choice: str) -> float:
        before, whole = tokenizer(start)["input_ids"], tokenizer(start + choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logits[i - 1, whole[i]]) for i in range(len(before), len(whole)))

    right = [
        max(range(2), key=lambda i, row=row: likelihood(str(row["start"]), row["choices"][i])) == row["answer"]  # type: ignore[index, misc]
        for row in ROWS
    ]
    assert found["metrics"]["right_word acc"]["value"] == pytest.approx(sum(right) / 3)
    assert sum(right) == 2
    assert found["hash"] == bundle.hash
    for tasks, message in ((["right_wrod"], "no task right_wrod"), ([str(tmp_path / "no.yaml")], "does not exist")):
        with pytest.raises(UserError, match=message):
            run_harness(bundle, with_values(config, {"evaluate.tasks": tasks}).evaluate, 0)
    with pytest.raises(UserError, match="needs a causal language model"):
        run_harness(lives.bundle("good"), config.evaluate, 0)

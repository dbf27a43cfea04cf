"""Token classification: labels aligned with sub-tokens, parity with transformers and seqeval, from rows to a measured bundle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.kinds.token_labels import NO_LABEL, TokenLabeledRows
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.remote_store import verify
from engine.data.shards import Split
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.evaluate.evaluate import evaluate_bundle
from engine.objectives.contract import check_data
from engine.objectives.token_classification import entities_of
from engine.train.job import TrainJob
from tests.engine.objectives.conftest import build_task, gradients, relative_error
from tests.engine.train.ranks import run_ranks

LABELS = ["B-LOC", "B-PER", "I-PER", "O"]
PEOPLE, PLACES = ["Ada", "Grace", "Zoë", "Edsger"], ["Berlin", "Oslo", "Köln", "Lagos"]
VERBS = ["visited", "left", "likes", "remembers"]


def sentence(numbers: random.Random) -> dict[str, Any]:
    person, place = numbers.choice(PEOPLE), numbers.choice(PLACES)
    words = [
        person,
        f"van{numbers.randrange(9)}",
        numbers.choice(VERBS),
        place,
        "on",
        f"day{numbers.randrange(400)}",
        ".",
    ]
    return {"tokens": words, "ner_tags": ["B-PER", "I-PER", "O", "B-LOC", "O", "O", "O"]}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbers = random.Random(0)
    rows = [sentence(numbers) for _ in range(300)]
    rows[1]["ner_tags"] = None  # the first label doesn't tell the kind of data: the next ones do
    rows[2]["ner_tags"] = ["O"]
    rows[3]["tokens"] = "one text"
    rows[4] = {"tokens": ["Oslo", "x\u200b", "late"], "ner_tags": ["B-LOC", None, "O"]}
    path = tmp_path_factory.mktemp("sentences") / "train.jsonl"
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in [1, 0, *range(2, 300)]))
    return path


@pytest.fixture(scope="module")
def config(tiny: Config, sentences: Path) -> Config:
    return with_values(
        tiny,
        {
            "data.source": "files", "data.path": str(sentences), "data.text_column": "tokens", "data.label_column": "ner_tags",
            "data.name": "sentences", "data.max_documents": None, "data.validation_fraction": 0.2, "data.test_fraction": 0.2,
            "objective.name": "token_classification", "model.type": "bert", "model.num_key_value_heads": None,
        },
    )  # fmt: skip


def test_labels_are_at_the_first_token_of_each_word(config: Config) -> None:
    folder = prepare(config)
    manifest, tokenizer = verify(folder), load_tokenizer(folder / "tokenizer")
    assert (manifest.kind, manifest.labels) == ("token_labels", LABELS)
    assert manifest.skipped["without a label"] == 1
    assert manifest.skipped["with other numbers of words and labels"] == 1
    assert manifest.skipped["without a list of words"] == 1
    split = Split.open(folder, "train")
    objective, _, _ = build_task(config)
    samples = objective.samples(split)
    seen = 0
    for i in range(len(samples)):
        sample = samples[i]
        assert sample["tokens"].shape == sample["labels"].shape
        words = tokenizer.decode(sample["tokens"]).split()
        firsts = np.flatnonzero(sample["labels"] != NO_LABEL)
        if len(words) == 7:
            seen += 1
            assert [LABELS[label] for label in sample["labels"][firsts]] == [
                "B-PER",
                "I-PER",
                "O",
                "B-LOC",
                "O",
                "O",
                "O",
            ]
            for word, start, stop in zip(words, firsts, [*firsts[1:], len(sample["tokens"])], strict=True):
                assert tokenizer.decode(sample["tokens"][start:stop]).strip() == word
    assert seen > 100


def test_alignment_equals_that_of_transformers(config: Config, sentences: Path, tmp_path: Path) -> None:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    words = tmp_path / "words.txt"
    words.write_text("".join(" ".join(json.loads(line)["tokens"]) + "\n" for line in sentences.open()))
    trained = BertWordPieceTokenizer(lowercase=False)
    trained.train([str(words)], vocab_size=120, show_progress=False)
    trained.save_model(str(tmp_path))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=False)
    tokenizer.save_pretrained(tmp_path / "bert")
    folder = prepare(with_values(config, {"data.tokenizer": str(tmp_path / "bert")}))
    split, manifest = Split.open(folder, "train"), Manifest.load(folder)
    assert manifest.closing_tokens == 1  # [SEP]
    rows: dict[tuple[int, ...], list[int]] = {}
    for line in sentences.open():
        row = json.loads(line)
        if not isinstance(row["tokens"], list) or not row["ner_tags"] or len(row["tokens"]) != len(row["ner_tags"]):
            continue
        encoding = tokenizer(row["tokens"], is_split_into_words=True)
        labels, previous = [], None
        for word in encoding.word_ids():  # as in transformers' examples/pytorch/token-classification
            tag = None if word is None or word == previous else row["ner_tags"][word]
            labels.append(NO_LABEL if tag is None else manifest.labels.index(tag))
            previous = word
        rows[tuple(encoding["input_ids"])] = labels
    assert split.num_rows > 100
    for i in range(split.num_rows):
        assert split.value("labels", i).tolist() == rows[tuple(split.document(i).tolist())]


def test_loss_and_gradients_equal_transformers(config: Config) -> None:
    objective, model, folder = build_task(config)
    samples = objective.samples(Split.open(folder, "train"))
    batch = objective.collate([samples[i] for i in range(6)])
    loss = objective.loss(model, batch)
    assert loss.count == int((batch.targets != NO_LABEL).sum()) > 6 * 2
    ours = gradients(model, loss.sum / loss.count)
    theirs = model(**batch.inputs, labels=batch.targets).loss
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert relative_error(ours, gradients(model, theirs)) < 1e-5


def test_entities_equal_those_of_seqeval() -> None:
    assert entities_of(["B-PER", "I-PER", "O", "B-LOC", "I-PER", "I-PER"]) == {
        (0, 2, "PER"),
        (3, 4, "LOC"),
        (4, 6, "PER"),
    }
    assert entities_of(["NOUN", "NOUN"]) == {(0, 1, "NOUN"), (1, 2, "NOUN")}
    seqeval = pytest.importorskip("seqeval.metrics")
    numbers = random.Random(0)
    tags = ["O", *(f"{prefix}-{name}" for prefix in "BIES" for name in ("PER", "LOC"))]
    for _ in range(300):
        row = numbers.choices(tags, k=numbers.randrange(1, 12))
        theirs = seqeval.sequence_labeling.get_entities(row)
        assert entities_of(row) == {(start, end + 1, name) for name, start, end in theirs}


def test_metrics_equal_those_of_seqeval(config: Config) -> None:
    objective, model, folder = build_task(config)
    split = Split.open(folder, "test")
    samples = objective.samples(split)
    batches = [objective.collate([samples[i] for i in range(first, min(first + 7, len(samples)))]) for first in range(0, len(samples), 7)]  # fmt: skip
    metrics = objective.metrics(model, batches)
    true, predicted = [], []
    for batch in batches:
        classes = model(**batch.inputs).logits.argmax(2)
        for row, targets in zip(classes, batch.targets, strict=True):
            true.append([LABELS[i] for i in targets[targets != NO_LABEL]])
            predicted.append([LABELS[i] for i in row[targets != NO_LABEL]])
    right = [a == b for row in zip(true, predicted, strict=True) for a, b in zip(*row, strict=True)]
    assert metrics["accuracy"] == pytest.approx(np.mean(right))
    seqeval = pytest.importorskip("seqeval.metrics")
    assert metrics["entity_f1"] == pytest.approx(seqeval.f1_score(true, predicted, zero_division=0))
    assert metrics["entity_precision"] == pytest.approx(seqeval.precision_score(true, predicted, zero_division=0))
    assert metrics["entity_recall"] == pytest.approx(seqeval.recall_score(true, predicted, zero_division=0))


def test_each_word_is_predicted_with_its_characters(config: Config) -> None:
    objective, model, _ = build_task(config)
    words, text = ["Zoë", "van3", "visited", "Köln", "."], "Zoë van3 visited Köln."
    by_words, by_text = objective.predict(model, [{"words": words}, {"text": text}])
    assert [(word["word"], word["start"], word["end"]) for word in by_text["words"]] == [
        ("Zoë", 0, 3), ("van3", 4, 8), ("visited", 9, 16), ("Köln", 17, 21), (".", 21, 22),
    ]  # fmt: skip
    assert [word["word"] for word in by_words["words"]] == words
    sample = objective.prepare({"words": words})
    with torch.no_grad():
        probabilities = model(**objective.collate([sample]).inputs).logits[0].softmax(1)
    for word, token in zip(by_words["words"], sample["first_tokens"], strict=True):
        assert word["label"] == LABELS[int(probabilities[token].argmax())]
        assert word["score"] == pytest.approx(float(probabilities[token].max()), abs=1e-6)
    assert len(objective.predict(model, [{"words": ["x"] * 500}])[0]["words"]) <= objective.sequence_length


def test_streamed_class_labels_keep_their_names(config: Config, sentences: Path, tmp_path: Path) -> None:
    import datasets

    rows = [
        row for line in sentences.open() if len((row := json.loads(line))["ner_tags"] or []) == 7 == len(row["tokens"])
    ]
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=LABELS)),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "hub" / "train.parquet"))
    hub = {"data.source": "huggingface", "data.path": str(tmp_path / "hub"), "data.shard_tokens": 1024}
    streamed, cached = (Split.open(prepare(with_values(config, hub | {"data.stream": stream})), "train") for stream in (True, False))  # fmt: skip
    assert streamed.manifest.labels == LABELS
    first, second = (sorted((s.document(i).tolist(), s.value("labels", i).tolist()) for i in range(s.num_rows)) for s in (streamed, cached))  # fmt: skip
    assert len(first) > 100
    assert {label for _, labels in first for label in labels} == {NO_LABEL, 0, 1, 2, 3}
    assert all(sum(label != NO_LABEL for label in labels) == 7 for _, labels in [*first, *second])


def test_trained_fine_tuned_and_evaluated(config: Config, runs_dir: Path, sentences: Path) -> None:
    from transformers import pipeline

    long = with_values(config, {"name": "ner", "train.max_steps": 60, "train.global_batch": 16, "optim.lr": 5e-3})
    lines = run_ranks([TrainJob(long, prepare(long))], 1)[0]
    folder = runs_dir / "ner" / "bundle"
    assert lines
    tuned = with_values(long, {"name": "ner-tuned", "train.max_steps": 4, "optim.lr": 1e-3})
    run_ranks([TrainJob(tuned, prepare(tuned, folder), folder)], 2)
    measured = [
        evaluate_bundle(runs_dir / name / "bundle", with_values(config, {"evaluate.resamples": 100}))
        for name in ("ner", "ner-tuned")
    ]
    for evaluation in measured:
        assert evaluation.metrics["entity_f1"].value > 0.9
        assert evaluation.examples == Split.open(evaluation.data, "test").num_rows
    bundle = Bundle.open(folder)
    (ours,) = bundle.objective().predict(bundle.model(), [{"words": ["Ada", "van1", "left", "Oslo", "."]}])
    assert [word["label"] for word in ours["words"]] == ["B-PER", "I-PER", "O", "B-LOC", "O"]
    theirs = pipeline("token-classification", model=str(folder), tokenizer=str(folder))("Ada van1 left Oslo .")
    at = {word["start"]: word for word in ours["words"]}
    for token in theirs:
        start = token["start"] + (token["word"][0] == "Ġ")
        if start in at:
            assert token["entity"] == at[start]["label"]
            assert token["score"] == pytest.approx(at[start]["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.label_column": None}, "reads words with labels, and the data are text without labels"),
        ({"data.mask": ["emails"]}, "data.mask changes the text, whose words have labels"),
        ({"data.label_column": "tags"}, r"no column 'tags' \(data.label_column\)"),
        ({"objective.name": "classification"}, "has no labels: prepare it with data.label_column"),
        ({"objective.name": "masked_lm"}, "reads text without labels, and the data are texts with labels or words with labels"),
    ],
)  # fmt: skip
def test_invalid_data_raise_a_one_line_error(config: Config, changes: dict[str, Any], message: str) -> None:
    wrong = with_values(config, changes)
    with pytest.raises(UserError, match=message):
        _open_samples(wrong)


def _open_samples(config: Config) -> None:
    check_data(config.objective.name, config.data)
    objective, _, folder = build_task(config)
    objective.samples(Split.open(folder, "train"))


def test_text_with_one_label_is_still_labeled_text(tiny: Config, tmp_path: Path) -> None:
    rows = [{"text": f"text number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data.source": "files", "data.path": str(path), "data.label_column": "label", "data.max_documents": None}
    split = Split.open(prepare(with_values(tiny, options | {"data.name": "parity"})), "train")
    assert split.manifest.kind == "labelled"
    with pytest.raises(UserError, match="has no labels of words"):
        TokenLabeledRows(split, 8)

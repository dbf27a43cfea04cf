"""Causal, masked and classification objectives: parity with transformers in loss, gradients and predictions; metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import Config, ObjectiveConfig, with_values
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.models.build import build_model
from engine.objectives.contract import Objective, objective_class
from tests.engine.objectives.conftest import gradients


def make_objective(config: Config, labels: list[str]) -> Objective:
    tokenizer = load_tokenizer(prepare(config) / "tokenizer")
    return objective_class(config.objective.name)(config.objective, tokenizer, config.data.sequence_length, labels)


@pytest.fixture(scope="module")
def causal_lm(tiny: Config) -> Objective:
    return make_objective(tiny, [])


@pytest.fixture(scope="module")
def classifier(tiny_functions: Config) -> Objective:
    return make_objective(tiny_functions, Manifest.load(prepare(tiny_functions)).labels)


def make_model(config: Config, objective: Objective) -> torch.nn.Module:
    return build_model(config.model, objective.tokenizer, objective.auto_class, objective.model_options(), seed=1)


def test_causal_lm_loss_and_gradients_equal_transformers(tiny: Config, causal_lm: Objective) -> None:
    model = make_model(tiny, causal_lm)
    samples = causal_lm.samples(Split.open(prepare(tiny), "train"))
    batch = causal_lm.collate([samples[i] for i in range(4)])
    loss = causal_lm.loss(model, batch)
    assert (loss.count, batch.tokens) == (4 * 32, 4 * 32)
    ours = gradients(model, loss.sum / loss.count)
    tokens = torch.stack([torch.as_tensor(samples[i]["tokens"]) for i in range(4)])
    theirs = model(input_ids=tokens, labels=tokens).loss  # shifts by itself: the same 32 targets per row
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, gradient in gradients(model, theirs).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_classification_loss_and_gradients_equal_transformers(tiny_functions: Config, classifier: Objective) -> None:
    model = make_model(tiny_functions, classifier)
    samples = classifier.samples(Split.open(prepare(tiny_functions), "train"))
    batch = classifier.collate([samples[i] for i in range(6)])
    loss = classifier.loss(model, batch)
    assert loss.count == 6
    ours = gradients(model, loss.sum / 6)
    theirs = model(**batch.inputs, labels=batch.targets).loss
    assert float(loss.sum.detach() / 6) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, gradient in gradients(model, theirs).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_greedy_prediction_equals_generate(tiny: Config, causal_lm: Objective) -> None:
    model = make_model(tiny, causal_lm).eval()
    (answer,) = causal_lm.predict(model, [{"prompt": "import os", "max_tokens": 9}])
    ids = causal_lm.tokenizer("import os", return_tensors="pt")["input_ids"]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=1
    )
    assert answer["tokens"] == expected[0, ids.shape[1] :].tolist()
    assert answer["text"] == causal_lm.tokenizer.decode(answer["tokens"], skip_special_tokens=True)


def test_classification_does_not_depend_on_the_batch(tiny_functions: Config, classifier: Objective) -> None:
    model = make_model(tiny_functions, classifier).eval()
    texts = [{"text": "return self.x"}, {"text": "for i in range(10):\n    total += values[i] * weights[i]"}]
    batched = classifier.predict(model, texts)
    for request, answer in zip(texts, batched, strict=True):
        (alone,) = classifier.predict(model, [request])
        assert alone["label"] == answer["label"]
        assert list(alone["scores"].values()) == pytest.approx(list(answer["scores"].values()), abs=1e-6)
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_metrics_by_hand(classifier: Objective, causal_lm: Objective) -> None:
    scores = {"nll": np.array([1.0, 2.0, 3.0]), "label": np.array([0, 1, 2]), "predicted": np.array([0, 1, 1])}
    assert classifier.summarize(scores) == {"accuracy": 2 / 3, "loss": 2.0}
    metrics = causal_lm.summarize({"nll": np.array([6.0, 2.0]), "tokens": np.array([3, 1])})
    assert metrics == {"loss": 2.0, "perplexity": pytest.approx(np.exp(2.0))}


def test_classification_needs_two_labels_and_an_unknown_objective_gets_a_suggestion(tiny: Config) -> None:
    objective = objective_class("classification")(ObjectiveConfig("classification"), None, 8, ["one"])
    with pytest.raises(UserError, match="two labels or more, the data has 1"):
        objective.model_options()
    with pytest.raises(UserError, match="did you mean 'causal_lm'"):
        objective_class("causal_lmm")


def test_sentiment_data_have_labels(tiny: Config) -> None:
    data = Path(__file__).parents[4] / "shared" / "data" / "sentiment"
    if not data.exists():
        pytest.skip("the shared data (SST-2) are not next to this checkout")
    config = with_values(
        tiny,
        {"data.source": "files", "data.path": str(data / "validation.jsonl"), "data.label_column": "label",
         "objective.name": "classification", "data.max_documents": 200},
    )  # fmt: skip
    manifest = Manifest.load(prepare(config))
    assert manifest.labels == ["0", "1"]


@pytest.fixture(scope="module")
def tiny_masked(tiny: Config) -> Config:
    return with_values(tiny, {"model.type": "bert", "model.num_key_value_heads": None, "objective.name": "masked_lm"})


def test_masked_lm_loss_and_gradients_equal_transformers(tiny_masked: Config) -> None:
    masked_lm = make_objective(tiny_masked, [])
    model = make_model(tiny_masked, masked_lm)
    samples = masked_lm.samples(Split.open(prepare(tiny_masked), "train"))
    batch = masked_lm.collate([samples[i] | {"draw": i} for i in range(4)])
    loss = masked_lm.loss(model, batch)
    assert loss.count == int((batch.targets != -100).sum()) == 4 * round(0.15 * 32)
    ours = gradients(model, loss.sum / loss.count)
    theirs = model(**batch.inputs, labels=batch.targets).loss
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, gradient in gradients(model, theirs).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_masking_depends_on_the_draw_alone_and_has_berts_rates(tiny_masked: Config) -> None:
    masked_lm = make_objective(tiny_masked, [])
    tokens = np.arange(10, 10 + 400, dtype=np.int64)
    inputs, targets = masked_lm.mask(tokens, 7)  # type: ignore[attr-defined]
    again = masked_lm.mask(tokens, 7)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(inputs, again[0])
    assert not np.array_equal(targets, masked_lm.mask(tokens, 8)[1])  # type: ignore[attr-defined]
    chosen = targets != -100
    np.testing.assert_array_equal(targets[chosen], tokens[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    action_counts = np.zeros(3)
    for draw in range(200):
        inputs, targets = masked_lm.mask(tokens, draw)  # type: ignore[attr-defined]
        chosen = targets != -100
        assert chosen.sum() == 60
        masked = inputs[chosen] == masked_lm.tokenizer.mask_token_id
        kept = inputs[chosen] == tokens[chosen]
        action_counts += [masked.sum(), (~masked & ~kept).sum(), kept.sum()]
    assert action_counts / action_counts.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_special_tokens_are_not_masked(tiny_masked: Config) -> None:
    masked_lm = make_objective(tiny_masked, [])
    end = masked_lm.tokenizer.eos_token_id
    tokens = np.array([end, 20, 21, end], dtype=np.int64)
    for draw in range(20):
        inputs, targets = masked_lm.mask(tokens, draw)  # type: ignore[attr-defined]
        assert targets[0] == targets[3] == -100
        assert inputs[0] == inputs[3] == end


def test_filled_mask_is_the_likeliest_token(tiny_masked: Config) -> None:
    masked_lm = make_objective(tiny_masked, [])
    model = make_model(tiny_masked, masked_lm).eval()
    text = f"import {masked_lm.tokenizer.mask_token}\nreturn"
    (answer,) = masked_lm.predict(model, [{"text": text}])
    ids = masked_lm.tokenizer(text, return_tensors="pt")["input_ids"]
    position = int((ids[0] == masked_lm.tokenizer.mask_token_id).nonzero())
    assert answer["tokens"] == [int(model(ids).logits[0, position].argmax())]
    assert answer["text"].startswith("import ")

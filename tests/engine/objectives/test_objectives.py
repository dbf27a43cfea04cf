"""Parity with transformers: the loss and the gradients of a batch, and what is predicted."""

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
from engine.models.build import build
from engine.objectives.contract import Objective, objective_class


def make(config: Config, labels: list[str]) -> Objective:
    tokenizer = load_tokenizer(prepare(config) / "tokenizer")
    return objective_class(config.objective.name)(config.objective, tokenizer, config.data.sequence_length, labels)


@pytest.fixture(scope="module")
def language(tiny: Config) -> Objective:
    return make(tiny, [])


@pytest.fixture(scope="module")
def naming(tiny_functions: Config) -> Objective:
    return make(tiny_functions, Manifest.load(prepare(tiny_functions)).labels)


def model_of(config: Config, objective: Objective) -> torch.nn.Module:
    return build(config.model, objective.tokenizer, objective.auto_class, objective.model_options(), seed=1)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_causal_loss_and_gradients_are_those_of_transformers(tiny: Config, language: Objective) -> None:
    model = model_of(tiny, language)
    samples = language.samples(Split.open(prepare(tiny), "train"))
    batch = language.collate([samples[i] for i in range(4)])
    loss = language.loss(model, batch)
    assert (loss.count, batch.tokens) == (4 * 32, 4 * 32)
    ours = gradients(model, loss.sum / loss.count)
    whole = torch.stack([torch.as_tensor(samples[i]["tokens"]) for i in range(4)])
    theirs = model(input_ids=whole, labels=whole).loss  # shifts by itself: the same 32 targets a row
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, gradient in gradients(model, theirs).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_classification_loss_and_gradients_are_those_of_transformers(tiny_functions: Config, naming: Objective) -> None:
    model = model_of(tiny_functions, naming)
    samples = naming.samples(Split.open(prepare(tiny_functions), "train"))
    batch = naming.collate([samples[i] for i in range(6)])
    loss = naming.loss(model, batch)
    assert loss.count == 6
    ours = gradients(model, loss.sum / 6)
    theirs = model(**batch.inputs, labels=batch.targets).loss
    assert float(loss.sum.detach() / 6) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, gradient in gradients(model, theirs).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_greedy_prediction_is_generate(tiny: Config, language: Objective) -> None:
    model = model_of(tiny, language).eval()
    (answer,) = language.predict(model, [{"prompt": "import os", "max_tokens": 9}])
    ids = language.tokenizer("import os", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=1)
    assert answer["tokens"] == wanted[0, ids.shape[1] :].tolist()
    assert answer["text"] == language.tokenizer.decode(answer["tokens"], skip_special_tokens=True)


def test_company_does_not_change_a_classification(tiny_functions: Config, naming: Objective) -> None:
    model = model_of(tiny_functions, naming).eval()
    texts = [{"text": "return self.x"}, {"text": "for i in range(10):\n    total += values[i] * weights[i]"}]
    together = naming.predict(model, texts)
    for request, answer in zip(texts, together, strict=True):
        (alone,) = naming.predict(model, [request])
        assert alone["label"] == answer["label"]
        assert list(alone["scores"].values()) == pytest.approx(list(answer["scores"].values()), abs=1e-6)
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_metrics_by_hand(naming: Objective, language: Objective) -> None:
    scores = {"nll": np.array([1.0, 2.0, 3.0]), "label": np.array([0, 1, 2]), "predicted": np.array([0, 1, 1])}
    assert naming.summarize(scores) == {"accuracy": 2 / 3, "loss": 2.0}
    found = language.summarize({"nll": np.array([6.0, 2.0]), "tokens": np.array([3, 1])})
    assert found == {"loss": 2.0, "perplexity": pytest.approx(np.exp(2.0))}


def test_labels_are_needed(tiny: Config) -> None:
    objective = objective_class("classification")(ObjectiveConfig("classification"), None, 8, ["one"])
    with pytest.raises(UserError, match="two labels or more, the data has 1"):
        objective.model_options()
    with pytest.raises(UserError, match="did you mean 'causal_lm'"):
        objective_class("causal_lmm")


def test_real_sentiment_is_labelled(tiny: Config) -> None:
    data = Path(__file__).parents[4] / "shared" / "data" / "sentiment"
    if not data.exists():
        pytest.skip("the shared data (SST-2) is not beside this checkout")
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


def test_masked_loss_and_gradients_are_those_of_transformers(tiny_masked: Config) -> None:
    masking = make(tiny_masked, [])
    model = model_of(tiny_masked, masking)
    samples = masking.samples(Split.open(prepare(tiny_masked), "train"))
    batch = masking.collate([samples[i] | {"draw": i} for i in range(4)])
    loss = masking.loss(model, batch)
    assert loss.count == int((batch.targets != -100).sum()) == 4 * round(0.15 * 32)
    ours = gradients(model, loss.sum / loss.count)
    theirs = model(**batch.inputs, labels=batch.targets).loss
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, gradient in gradients(model, theirs).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_masks_depend_on_the_draw_alone_and_are_berts(tiny_masked: Config) -> None:
    masking = make(tiny_masked, [])
    tokens = np.arange(10, 10 + 400, dtype=np.int64)
    inputs, targets = masking.mask(tokens, 7)  # type: ignore[attr-defined]
    again = masking.mask(tokens, 7)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(inputs, again[0])
    assert not np.array_equal(targets, masking.mask(tokens, 8)[1])  # type: ignore[attr-defined]
    chosen = targets != -100
    np.testing.assert_array_equal(targets[chosen], tokens[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    fates = np.zeros(3)
    for draw in range(200):
        inputs, targets = masking.mask(tokens, draw)  # type: ignore[attr-defined]
        chosen = targets != -100
        assert chosen.sum() == 60
        masked = inputs[chosen] == masking.tokenizer.mask_token_id
        kept = inputs[chosen] == tokens[chosen]
        fates += [masked.sum(), (~masked & ~kept).sum(), kept.sum()]
    assert fates / fates.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_special_tokens_are_not_masked(tiny_masked: Config) -> None:
    masking = make(tiny_masked, [])
    end = masking.tokenizer.eos_token_id
    tokens = np.array([end, 20, 21, end], dtype=np.int64)
    for draw in range(20):
        inputs, targets = masking.mask(tokens, draw)  # type: ignore[attr-defined]
        assert targets[0] == targets[3] == -100
        assert inputs[0] == inputs[3] == end


def test_a_filled_mask_is_the_models_likeliest_token(tiny_masked: Config) -> None:
    masking = make(tiny_masked, [])
    model = model_of(tiny_masked, masking).eval()
    text = f"import {masking.tokenizer.mask_token}\nreturn"
    (answer,) = masking.predict(model, [{"text": text}])
    ids = masking.tokenizer(text, return_tensors="pt")["input_ids"]
    at = int((ids[0] == masking.tokenizer.mask_token_id).nonzero())
    assert answer["tokens"] == [int(model(ids).logits[0, at].argmax())]
    assert answer["text"].startswith("import ")

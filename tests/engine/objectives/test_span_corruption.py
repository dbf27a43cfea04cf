"""T5: spans that depend on the draw alone, no padding, parity with transformers, a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config
from engine.data.shards import Split
from engine.errors import UserError
from engine.objectives.span_corruption import random_segmentation
from tests.engine.objectives.conftest import (
    Curves,
    build_task,
    gradients,
    relative_error,
)  # fmt: skip


def test_loss_and_gradients_equal_transformers(family: Callable[..., Config]) -> None:
    objective, model, data = build_task(family("span_corruption"))
    samples = objective.samples(Split.open(data, "train"))
    batch = objective.collate([samples[i] | {"draw": i} for i in range(4)])
    loss = objective.loss(model, batch)
    assert batch.inputs["input_ids"].shape == (4, 32)  # sequence_length, without padding
    assert int(batch.inputs["attention_mask"].sum()) == 4 * 32
    assert loss.count == batch.targets.numel()
    assert batch.tokens == 4 * 32 + loss.count
    ours = gradients(model, loss.sum / loss.count)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    theirs = model(input_ids=ids, attention_mask=mask, labels=batch.targets).loss
    assert float(loss.sum.detach() / loss.count) == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert relative_error(ours, gradients(model, theirs)) < 1e-6


def test_padding_does_not_change_the_loss(family: Callable[..., Config]) -> None:
    objective, model, _ = build_task(family("span_corruption"))
    samples = [objective.prepare({"text": text}) for text in ("import os", "for i in range(10):\n    print(i)", "x")]
    together = float(objective.loss(model.eval(), objective.collate(samples)).sum.detach())
    alone = [float(objective.loss(model, objective.collate([sample])).sum.detach()) for sample in samples]
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_input_and_target_hold_each_token_once(family: Callable[..., Config]) -> None:
    objective, _, _ = build_task(family("span_corruption"))
    raw, sentinels, end = objective.num_raw_tokens(), objective.sentinel_ids(), objective.tokenizer.eos_token_id  # type: ignore[attr-defined]
    tokens = np.arange(100, 100 + raw)
    inputs, targets = objective.corrupt(tokens, 5)  # type: ignore[attr-defined]
    again = objective.corrupt(tokens, 5)  # type: ignore[attr-defined]
    assert np.array_equal(inputs, again[0])
    assert np.array_equal(targets, again[1])
    assert not np.array_equal(inputs, objective.corrupt(tokens, 6)[0])  # type: ignore[attr-defined]
    noise, spans = round(0.15 * raw), round(round(0.15 * raw) / 3)
    assert (len(inputs), len(targets)) == (raw - noise + spans + 1, noise + spans + 1)
    assert len(inputs) == 32
    assert inputs[-1] == targets[-1] == end
    assert [token for token in inputs if token in sentinels] == sentinels[:spans]
    assert [token for token in targets if token in sentinels] == sentinels[:spans]
    span_of = dict(zip(sentinels, np.split(targets[:-1], [i for i, t in enumerate(targets) if t in sentinels])[1:]))
    restored = [part for token in inputs[:-1] for part in (span_of[token][1:] if token in span_of else [token])]
    assert restored == tokens.tolist()
    assert inputs[0] == 100  # it starts with a kept span


def test_lengths_equal_those_of_t5() -> None:
    from engine.config import ObjectiveConfig
    from engine.objectives.span_corruption import SpanCorruption

    objective = SpanCorruption(ObjectiveConfig("span_corruption"), None, 512)
    assert objective.num_raw_tokens() == 568  # the values of T5's own random_spans_helper for inputs of 512
    assert objective.corrupted_lengths(568)[:2] == (512, 114)


def test_random_segmentation_is_uniform() -> None:
    counts = np.zeros(7)
    for draw in range(6000):
        lengths = random_segmentation(6, 3, np.array([draw], np.uint64))
        assert lengths.sum() == 6
        assert (lengths >= 1).all()
        counts[lengths[0]] += 1
    assert counts[1:5] / 6000 == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)  # 4, 3, 2 and 1 of the 10 segmentations


def test_bundle_loads_with_plain_transformers(curves: Curves, runs_dir: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    bundle = Bundle.open(runs_dir / "span_corruption-two" / "bundle")
    tokenizer = AutoTokenizer.from_pretrained(bundle.folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(bundle.folder)
    text = "import <extra_id_0>\nreturn <extra_id_1> None"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert int(ids[0, -1]) == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"]) == bundle.objective().sentinel_ids()[:2]  # type: ignore[attr-defined]
    output = model.generate(ids, max_new_tokens=9, do_sample=False)
    (ours,) = bundle.objective().predict(bundle.model(), [{"text": text, "max_tokens": 9}])
    assert ours["tokens"] == output[0, 1:].tolist()
    request = bundle.manifest.golden[0]["request"]  # type: ignore[union-attr]
    targets = torch.tensor([request["targets"]])
    loss = model(input_ids=torch.tensor([request["tokens"]]), labels=targets).loss
    (scored,) = bundle.objective().predict(bundle.model(), [request])
    assert -float(np.mean(scored["logprobs"])) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_too_few_sentinels_are_rejected(family: Callable[..., Config]) -> None:
    with pytest.raises(
        UserError, match=r"removes 2 spans from a sample .* has 0 sentinel tokens.*data\.sentinel_tokens=2"
    ):
        build_task(family("span_corruption", data__sentinel_tokens=0))

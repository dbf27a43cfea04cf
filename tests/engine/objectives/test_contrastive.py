"""CLIP: the loss of the global batch for any split of it, recall, a bundle for plain transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.images import from_base64
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.objectives.contract import Batch, concat_scores
from tests.engine.objectives.conftest import (
    Curves,
    build_task,
    gradients,
    relative_error,
)  # fmt: skip


@dataclasses.dataclass
class FakeRank:
    """One of several ranks, with the rows that the others gathered."""

    rank: int
    all_rows: list[torch.Tensor]

    def all_gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        if self.rank < len(self.all_rows):
            return [rows if rank == self.rank else other for rank, other in enumerate(self.all_rows)]
        self.all_rows.append(rows)
        return self.all_rows


def make_batch(family: Callable[..., Config]) -> tuple[object, torch.nn.Module, list[dict[str, object]]]:
    objective, model, data = build_task(family("contrastive"))
    samples = objective.samples(Split.open(data, "train"))
    return objective, model, [samples[i] | {"draw": i} for i in range(11)]


def test_any_split_of_the_global_batch_has_the_loss_and_gradients_of_transformers(
    family: Callable[..., Config],
) -> None:
    objective, model, samples = make_batch(family)
    full_batch = objective.collate(samples)  # type: ignore[attr-defined]
    theirs = model(**full_batch.inputs, return_loss=True).loss
    expected = gradients(model, theirs)
    within_batch = objective.loss(model, full_batch)  # type: ignore[attr-defined]
    assert float(within_batch.sum.detach()) / 11 == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert relative_error(gradients(model, within_batch.sum / 11), expected) < 1e-6

    # Two ranks with two micro-batches each, one of them shorter, and one of weight 0 that only keeps the ranks in step.
    splits = [[(samples[:4], 1.0), (samples[8:11], 1.0)], [(samples[4:8], 1.0), (samples[:1], 0.0)]]
    shares: list[list[tuple[Batch, float]]] = [
        [(objective.collate(part), weight) for part, weight in rank]  # type: ignore[attr-defined]
        for rank in splits
    ]
    rows: list[torch.Tensor] = []
    for number in (0, 1):  # the rows that each rank gathers
        objective.before_step(model, shares[number], FakeRank(len(rows), rows))  # type: ignore[attr-defined]
    model.zero_grad()
    total = 0.0
    for number in (0, 1):
        for batch, weight in objective.before_step(model, shares[number], FakeRank(number, rows)):  # type: ignore[attr-defined]
            loss = objective.loss(model, batch)  # type: ignore[attr-defined]
            (loss.sum * weight / 11).backward()
            total += float(loss.sum.detach()) * weight
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert total / 11 == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert relative_error(ours, expected) < 1e-6
    assert float(ours["logit_scale"]) == pytest.approx(float(expected["logit_scale"]), rel=1e-5)


def test_chunked_loss_equals_the_loss_in_one_chunk(
    family: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.objectives import contrastive

    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(10, 6), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    in_one_chunk = contrastive.contrastive_loss_and_gradients(image, text, scale)
    monkeypatch.setattr(contrastive, "CHUNK_ROWS", 3)
    in_chunks = contrastive.contrastive_loss_and_gradients(image, text, scale)
    torch.testing.assert_close(in_chunks.loss_N, in_one_chunk.loss_N)
    torch.testing.assert_close(in_chunks.image_gradient_ND, in_one_chunk.image_gradient_ND)
    torch.testing.assert_close(in_chunks.text_gradient_ND, in_one_chunk.text_gradient_ND)
    assert in_chunks.scale_gradient == pytest.approx(in_one_chunk.scale_gradient, rel=1e-5)


def test_recall_by_hand_for_any_batch_size(family: Callable[..., Config]) -> None:
    objective, model, samples = make_batch(family)
    batches = [
        [objective.collate(samples[a : a + size]) for a in range(0, 11, size)]  # type: ignore[attr-defined]
        for size in (11, 3)
    ]
    metrics = [objective.metrics(model, batches_of_size) for batches_of_size in batches]  # type: ignore[attr-defined]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    scores = concat_scores(objective.score(model, batch) for batch in batches[1])  # type: ignore[attr-defined]
    captions, similarity = scores["caption"], scores["image"] @ scores["text"].T
    assert metrics[0]["accuracy"] == np.mean([captions[row.argmax()] == c for row, c in zip(similarity, captions)])
    assert metrics[0]["image_recall"] == np.mean(
        [captions[row.argmax()] == c for row, c in zip(similarity.T, captions)]
    )
    full_batch = batches[0][0]
    assert metrics[0]["loss"] == pytest.approx(float(model(**full_batch.inputs, return_loss=True).loss), rel=1e-5)


def test_bundle_loads_with_plain_transformers(curves: Curves, runs_dir: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    bundle = Bundle.open(runs_dir / "contrastive-two" / "bundle")
    processor, model = AutoProcessor.from_pretrained(bundle.folder), AutoModel.from_pretrained(bundle.folder)
    request = bundle.manifest.golden[0]["request"]  # type: ignore[union-attr]
    inputs = processor(
        text=request["captions"], images=from_base64(request["image"]), return_tensors="pt", padding=True
    )
    assert processor.tokenizer.eos_token_id in inputs["input_ids"][0]
    probabilities = model(**inputs).logits_per_image.softmax(1)[0].tolist()
    (ours,) = bundle.objective().predict(bundle.model(), [request])
    assert list(ours["scores"].values()) == pytest.approx(probabilities, abs=1e-6)


def test_captions_longer_than_the_models_positions_are_rejected(family: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"20 tokens are over the model's 16 positions: use data\.sequence_length=16"):
        build_task(family("contrastive", data__sequence_length=20))


def test_images_streamed_from_files_have_the_same_hash_as_those_held_in_memory(
    family: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = family("contrastive", data__validation_fraction=0.0, data__test_fraction=0.0)
    held = Manifest.load(prepare(config))
    monkeypatch.setattr("engine.data.prepare.MAX_CACHED_BYTES", 0)
    assert Manifest.load(prepare(with_values(config, {"runs_dir": str(tmp_path)}))).hash == held.hash

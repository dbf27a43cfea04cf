"""ViT: parity with transformers, a bundle with its image processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, ServeConfig, with_values
from engine.data.images import decode_image, encode_png, from_base64
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.remote_store import verify
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.evaluate import evaluate_bundle
from engine.models.size import parameter_count
from engine.serve.preflight import check_servable
from tests.engine.objectives.conftest import (
    Curves,
    build_task,
    gradients,
    relative_error,
)  # fmt: skip


def test_loss_and_gradients_equal_transformers(family: Callable[..., Config]) -> None:
    objective, model, data = build_task(family("image_classification"))
    samples = objective.samples(Split.open(data, "train"))
    batch = objective.collate([samples[i] for i in range(6)])
    loss = objective.loss(model, batch)
    assert (loss.count, batch.tokens) == (6, 6 * (2 * 2 + 1))
    ours = gradients(model, loss.sum / 6)
    theirs = model(**batch.inputs, labels=batch.targets).loss
    assert float(loss.sum.detach() / 6) == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert relative_error(ours, gradients(model, theirs)) < 1e-6


def test_faulty_rows_are_counted_and_pixels_equal_the_image_processors(
    family: Callable[..., Config], painted: Path
) -> None:
    objective, _, data = build_task(family("image_classification"))
    manifest = verify(data)
    assert (manifest.kind, manifest.image_size, manifest.labels) == ("images", 16, ["blue", "green", "red"])
    assert manifest.skipped == {"not an image": 1, "without a label": 1, "without an image": 1}
    assert sum(split["documents"] for split in manifest.splits.values()) == 93
    row = pq.read_table(painted).slice(7, 1).to_pylist()[0]
    image = decode_image(row["image"]["bytes"])
    expected = objective.image_processor(image, return_tensors="pt")["pixel_values"][0]
    sample = objective.prepare({"image": encode_png(np.asarray(image)), "label": row["colour"]})
    actual = objective.collate([sample]).inputs["pixel_values"][0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    shards = [Split.open(data, name) for name in manifest.splits]
    assert any((split.image(i) == sample["pixels"]).all() for split in shards for i in range(split.num_rows))
    assert np.array_equal(np.asarray(from_base64(encode_png(sample["pixels"]))), sample["pixels"])


def test_prepared_folder_depends_on_the_image_processor(family: Callable[..., Config]) -> None:
    config = family("image_classification")
    larger = with_values(config, {"data.image_size": 24})
    assert prepare(config) == prepare(with_values(config, {"data.sequence_length": 77}))
    assert Manifest.load(prepare(larger)).image_size == 24 != Manifest.load(prepare(config)).image_size
    other_processor = with_values(config, {"data.image_processor": str(prepare(larger) / "processor")})
    assert Manifest.load(prepare(other_processor)).hash == Manifest.load(prepare(larger)).hash
    path = prepare(larger) / "processor" / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(UserError, match="processor was changed since it was prepared"):
        verify(prepare(larger))


def test_bundle_loads_with_plain_transformers(curves: Curves, runs_dir: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    bundle = Bundle.open(runs_dir / "image_classification-two" / "bundle")
    processor = AutoImageProcessor.from_pretrained(bundle.folder)
    model = AutoModelForImageClassification.from_pretrained(bundle.folder)
    request = bundle.manifest.golden[0]["request"]  # type: ignore[union-attr]
    probabilities = model(**processor(from_base64(request["image"]), return_tensors="pt")).logits.softmax(1)[0]
    (ours,) = bundle.objective().predict(bundle.model(), [request])
    assert list(ours["scores"].values()) == pytest.approx(probabilities.tolist(), abs=1e-6)
    assert ours["label"] == model.config.id2label[int(probabilities.argmax())]
    plain = Bundle(bundle.folder, None)
    assert plain.objective().predict(plain.model(), [request]) == [ours]


def test_bundle_is_evaluated(curves: Curves, family: Callable[..., Config], runs_dir: Path) -> None:
    folder = runs_dir / "image_classification-two" / "bundle"
    config = family("image_classification", evaluate__resamples=100)
    evaluation = evaluate_bundle(folder, config)
    split = Split.open(evaluation.data, "test")
    assert evaluation.examples == split.num_rows
    assert evaluation.majority is not None
    assert 0 <= evaluation.metrics["accuracy"].value <= 1
    bundle = Bundle.open(folder)
    labels = [
        bundle.objective().predict(bundle.model(), [{"image": encode_png(split.image(i))}])[0]["label"]
        for i in range(split.num_rows)
    ]
    names = Manifest.load(evaluation.data).labels
    assert evaluation.metrics["accuracy"].value == np.mean(
        [names[split.label(i)] == labels[i] for i in range(split.num_rows)]
    )
    with pytest.raises(
        UserError, match=r"is for image_classification, which reads images with labels, and the data are text"
    ):
        evaluate_bundle(folder, with_values(config, {"data.image_column": None, "data.label_column": None}))


def test_image_bundle_cannot_be_deployed(curves: Curves, runs_dir: Path) -> None:
    bundle = Bundle.open(runs_dir / "image_classification-two" / "bundle")
    with pytest.raises(UserError, match="is for image_classification, which the endpoint doesn't offer"):
        check_servable(bundle, ServeConfig())


def test_flops_by_hand(family: Callable[..., Config]) -> None:
    objective, model, _ = build_task(family("image_classification"))
    (stack,) = objective.transformer_stacks(model.config)
    positions, tokens = 5 * 32, 5
    matrices = parameter_count(model) - positions
    assert stack.tokens == tokens
    assert objective.flops(model) == tokens * (6 * matrices + 12 * 2 * 32 * tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.type": "llama", "model.options": {}}, "model.type=llama reads no images"),
        ({"data.image_size": 20}, "images of 20 pixels cannot be split into patches of 8: use data.image_size=16"),
        ({"data.image_column": "picture"}, r"no column 'picture' \(data.image_column\)"),
        ({"data.label_column": None}, "two labels or more, the data has 0: check data.label_column"),
        ({"data.caption": "always the same"}, "is the same for every image"),
        ({"data.caption": "a {label"}, "cannot be parsed"),
        ({"data.source": "python_stdlib"}, "use data.source=files"),
        ({"model.options": {"patch_size": 8, "image_size": 32}}, "model.image_size 32 is not that of the images, 16"),
    ],
)  # fmt: skip
def test_invalid_config_raises_a_one_line_error(
    family: Callable[..., Config], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_task(with_values(family("image_classification"), changes))
    assert "\n" not in str(error.value)

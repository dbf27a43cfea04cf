"""Name the class of an image (Dosovitskiy et al. 2021, ViT). Shapes: B batch, S side, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.data.images import Pictures, from_base64, normalized, pixels, png
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.size import Stack
from engine.objectives import classification
from engine.objectives.contract import Batch


class ImageClassification(classification.SequenceClassification):
    """One label an image, cross-entropy over the classes. An image's tokens are its patches and the class token."""

    data_kind = "images"
    auto_class = "AutoModelForImageClassification"
    architectures = ("ForImageClassification",)
    servable = False
    image_tokens = 1  # until the model is met

    def bind_model(self, config: Any) -> None:
        """Count the tokens of an image."""
        self.image_tokens = patches(config) + 1

    def stacks(self, config: Any) -> list[Stack]:
        """Return the one stack, through which all tokens of an image go."""
        return [Stack(config, patches(config) + 1)]

    def samples(self, split: Split) -> Pictures:
        """Take the labelled images."""
        return Pictures(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Cut and scale {"image": a file in base64}; the label, where there is one, becomes its index."""
        label = example.get("label")
        return {
            "pixels": pixels(from_base64(example["image"]), self.image_processor),
            "label": self.labels.index(label) if label is not None else 0,
        }

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Normalize as the image processor does."""
        pixels_BSSC = np.stack([sample["pixels"] for sample in samples])
        labels_B = torch.tensor([int(sample["label"]) for sample in samples])
        inputs = {"pixel_values": torch.from_numpy(normalized(pixels_BSSC, self.image_processor))}
        return Batch(inputs, labels_B, count=len(samples), tokens=len(samples) * self.image_tokens)

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take three images."""
        return [{"image": png(split.image(i))} for i in range(min(3, split.rows))]


def patches(config: Any) -> int:
    """Return the patches of an image. Raises UserError for a transformers config that has none."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int):
        raise UserError(
            f"model.type={config.model_type} cuts no image into square patches: use model=vit_5m, or another of its kind"
        )
    if side % patch:
        raise UserError(
            f"images of {side} pixels cannot be cut into patches of {patch}: use data.image_size={side // patch * patch}"
        )
    return (side // patch) ** 2

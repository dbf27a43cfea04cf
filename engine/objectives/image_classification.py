"""Image classification (Dosovitskiy et al. 2021, ViT). Shapes: B batch, S side, C channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.data.images import encode_png, from_base64, normalize, to_pixels
from engine.data.kinds.images import ImageSamples
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.size import TransformerStack
from engine.objectives import classification
from engine.objectives.contract import Batch


class ImageClassification(classification.SequenceClassification):
    """One label per image, cross-entropy over the classes. An image's tokens are its patches and the class token."""

    data_kind = "images"
    auto_class = "AutoModelForImageClassification"
    architectures = ("ForImageClassification",)
    pipeline_tag = "image-classification"
    intended_use = "classifying images into the labels below"
    endpoint_task = None
    can_embed = False
    servable = False
    peft_task_type = None
    tokens_per_image = 1  # set by bind_model

    def bind_model(self, config: Any) -> None:
        """Set the number of tokens of an image."""
        self.tokens_per_image = num_patches(config) + 1

    def transformer_stacks(self, config: Any) -> list[TransformerStack]:
        """Return the encoder, which all tokens of an image pass through."""
        return [TransformerStack(config, num_patches(config) + 1)]

    def samples(self, split: Split) -> ImageSamples:
        """Return the labeled images."""
        return ImageSamples(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Crop and resize {"image": a file in base64}, and map its label, if it has one, to its index."""
        label = example.get("label")
        return {
            "pixels": to_pixels(from_base64(example["image"]), self.image_processor),
            "label": self.labels.index(label) if label is not None else 0,
        }

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Normalize the pixels as the image processor does."""
        pixels_BSSC = np.stack([sample["pixels"] for sample in samples])
        labels_B = torch.tensor([int(sample["label"]) for sample in samples])
        inputs = {"pixel_values": torch.from_numpy(normalize(pixels_BSSC, self.image_processor))}
        return Batch(inputs, labels_B, count=len(samples), tokens=len(samples) * self.tokens_per_image)

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take three images."""
        return [{"image": encode_png(split.image(i))} for i in range(min(3, split.num_rows))]


def num_patches(config: Any) -> int:
    """Return the number of patches of an image. Raises UserError for a transformers config without square patches."""
    side, patch_size = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch_size, int):
        raise UserError(
            f"model.type={config.model_type} does not split images into square patches: use model=vit_5m, or another vision transformer"
        )
    if side % patch_size:
        raise UserError(
            f"images of {side} pixels cannot be split into patches of {patch_size}: use data.image_size={side // patch_size * patch_size}"
        )
    return (side // patch_size) ** 2

"""How far the images that a model makes are from held-out ones: the Fréchet distance between their features.

Heusel et al. 2017 (https://arxiv.org/abs/1706.08500) take Inception's features, and published FIDs are of those. Here they are
a bundle's, or a random convolution's, so that the distance compares with nothing but itself: it is told beside that of other
real images, which a good model comes near to, and that of noise. It grows as images are fewer, by as much for each of the three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.bundles.bundle import Bundle
from engine.config import EvaluateConfig
from engine.data.images import normalize, to_pixels
from engine.data.order import splitmix64
from engine.data.shards import Split
from engine.errors import UserError
from engine.evaluate.bootstrap import Interval, num_examples, quantile_levels, resample_indices, select
from engine.objectives.contract import Scores
from engine.progress import Bar

Features = Callable[[np.ndarray], np.ndarray]  # of images, uint8 [N, S, S, 3] -> float64 [N, D]
RANDOM = "a random convolution"
WIDTHS = (3, 32, 64)  # channels of the random convolution
RESAMPLES = 200  # at most: each takes the roots of three matrices
BATCH = 64  # images whose features are computed at a time
MADE, REAL, NOISE = "made", "real", "noise"  # what is compared with the held-out images


@dataclass(frozen=True)
class ImageEvaluation:
    """The distances from held-out images, and what they are distances of."""

    features: str  # whose they are
    images: int  # of each kind
    metrics: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        metrics = {name: value.to_dict() for name, value in self.metrics.items()}
        return {"features": self.features, "images": self.images, "metrics": metrics}


def evaluate_images(
    bundle: Bundle, model: nn.Module, held_out: Split, other: Split, classes: np.ndarray, options: EvaluateConfig, seed: int
) -> ImageEvaluation:  # fmt: skip
    """Make an image of the label of each of the first held-out ones, and measure how far they are from those.

    `other` are real images to compare with, `classes` map the data's labels to the bundle's. Raises UserError for features
    of a bundle that has none, and for too few images.
    """
    images = min(options.images, held_out.num_rows, other.num_rows)
    if images < 2:
        raise UserError(
            f"a Fréchet distance needs two images or more, and there are {images}: use evaluate.images=0, or more data"
        )
    features = load_features(options.features)
    objective: Any = bundle.objective()
    labels = [int(classes[held_out.label(i)]) for i in range(images)]
    seeds = (splitmix64(np.array([seed % 2**64], np.uint64)) ^ np.arange(images, dtype=np.uint64)).tolist()
    made = []
    with Bar("images", total=images) as bar:
        for first in range(0, images, options.batch):
            chosen = slice(first, first + options.batch)
            made.append(objective.generate(model, labels[chosen], seeds[chosen]))
            bar.update(min(first + options.batch, images))
    spread = np.arange(images) * other.num_rows // images
    found = {
        "held_out": features(np.stack([held_out.image(i) for i in range(images)])),
        MADE: features(np.concatenate(made)),
        REAL: features(np.stack([other.image(int(i)) for i in spread])),
        NOISE: features(random_images(images, held_out.image(0).shape, seed)),
    }
    metrics = distance_intervals(found, options.confidence, min(options.resamples, RESAMPLES), seed)
    return ImageEvaluation(options.features or RANDOM, images, metrics)


def describe_images(told: dict[str, Any]) -> str:
    """Say what an `ImageCheck`, as plain values, measured."""
    return f"Distance of {told['images']:,} images from as many held-out ones, by features of {told['features']}"


def distance_intervals(features: Scores, confidence: float, resamples: int, seed: int) -> dict[str, Interval]:
    """Return the distances with the spread of their resamples, around each value.

    A resample has fewer different images, so its distance is larger on average: that is taken off.
    """
    drawn = [frechet_distances(select(features, pick)) for pick in resample_indices(num_examples(features), resamples, seed)]
    found = {}
    for name, value in frechet_distances(features).items():
        draws = np.array([draw[name] for draw in drawn])
        low, high = np.quantile(draws - draws.mean() + value, quantile_levels(confidence)).clip(min=0)
        found[name] = Interval(value, float(low), float(high))
    return found


def random_images(images: int, shape: Sequence[int], seed: int) -> np.ndarray:
    """Return images of noise: uint8 [images, *shape]."""
    return np.random.default_rng(seed).integers(0, 256, (images, *shape), dtype=np.uint8)


def load_features(reference: str | None) -> Features:
    """Return the features of the bundle in a folder; None: of the random convolution. Raises UserError."""
    if reference is None:
        return random_features
    bundle = Bundle.open(Path(reference))
    bundle.verify()
    if (task := bundle.objective().options.name) != "image_classification":
        raise UserError(
            f"evaluate.features={reference} is for {task}: give a bundle of objective=image_classification, or leave it out"
        )
    processor, model = bundle.objective().image_processor, bundle.model(torch.float32)

    @torch.inference_mode()
    def features(images_NSSC: np.ndarray) -> np.ndarray:
        from PIL import Image

        found = []
        for first in range(0, len(images_NSSC), BATCH):
            scaled = [to_pixels(Image.fromarray(image), processor) for image in images_NSSC[first : first + BATCH]]
            seen = torch.from_numpy(normalize(np.stack(scaled), processor))
            states: Tensor = model.base_model(pixel_values=seen).last_hidden_state  # type: ignore[operator]
            found.append(states.flatten(2).mean(2) if states.ndim == 4 else states.mean(1))
        return torch.cat(found).double().numpy()

    return features


@torch.inference_mode()
def random_features(images_NSSC: np.ndarray) -> np.ndarray:
    """Return what two layers of convolution with random weights see, mean over the image: float64 [N, 64].

    Such weights tell distributions of images apart fairly well (Naeem et al. 2020, https://arxiv.org/abs/2002.09797, section 3).
    """
    generator = np.random.Generator(np.random.Philox(key=0))
    kernels = [
        torch.from_numpy(generator.standard_normal((out, into, 5, 5), dtype=np.float32) * math.sqrt(2 / (25 * into)))
        for into, out in pairwise(WIDTHS)
    ]
    found = []
    for first in range(0, len(images_NSSC), BATCH):
        seen = torch.from_numpy(images_NSSC[first : first + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
        for kernel in kernels:
            seen = F.conv2d(seen, kernel, stride=2, padding=2).relu()
        found.append(seen.flatten(2).mean(2))
    return torch.cat(found).double().numpy()


def frechet_distances(features: Scores) -> dict[str, float]:
    """Give the Fréchet distance from the held-out images of those made, of other real ones and of noise."""
    mean, covariance = moments(features["held_out"])
    root = sqrt_covariance(covariance)
    found = {}
    for name, of in (("frechet_distance", MADE), ("frechet_distance_of_real", REAL), ("frechet_distance_of_noise", NOISE)):  # fmt: skip
        its_mean, its_covariance = moments(features[of])
        shared = np.sqrt(np.linalg.eigvalsh(root @ its_covariance @ root).clip(min=0)).sum()
        apart = float(((mean - its_mean) ** 2).sum())
        found[name] = max(apart + float(np.trace(covariance) + np.trace(its_covariance) - 2 * shared), 0.0)
    return found


def moments(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the covariance of features."""
    return features_ND.mean(0), np.cov(features_ND, rowvar=False)


def sqrt_covariance(matrix: np.ndarray) -> np.ndarray:
    """Return the square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    found: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return found

"""The Fréchet distance between the features of generated and of held-out images.

Heusel et al. 2017 (https://arxiv.org/abs/1706.08500) use Inception's features, and published FIDs are of those. Here the
features are those of a bundle or of a random convolution, so that the distance is comparable only with itself: it is
reported beside the distance of other real images, which a good model approaches, and that of noise. It grows as the number
of images falls, equally for the three.
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
from engine.progress import ProgressBar

Features = Callable[[np.ndarray], np.ndarray]  # of images, uint8 [N, S, S, 3] -> float64 [N, D]
RANDOM_FEATURES = "a random convolution"
WIDTHS = (3, 32, 64)  # channels of the random convolution
MAX_RESAMPLES = 200  # each takes the square roots of three matrices
BATCH = 64  # images per batch of feature extraction
GENERATED, REAL, NOISE = "generated", "real", "noise"  # images compared with the held-out ones


@dataclass(frozen=True)
class ImageEvaluation:
    """The distances from held-out images."""

    features: str  # the model that extracts them
    images: int  # of each kind
    metrics: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        metrics = {name: interval.to_dict() for name, interval in self.metrics.items()}
        return {"features": self.features, "images": self.images, "metrics": metrics}


def evaluate_images(
    bundle: Bundle, model: nn.Module, held_out: Split, other: Split, classes: np.ndarray, options: EvaluateConfig, seed: int
) -> ImageEvaluation:  # fmt: skip
    """Generate an image for the label of each of the first held-out images, and measure the distance between the two sets.

    `other` are real images to compare with; `classes` maps the data's labels to the bundle's. Raises UserError for features
    of a bundle that has none, and for too few images.
    """
    images = min(options.images, held_out.num_rows, other.num_rows)
    if images < 2:
        raise UserError(
            f"a Fréchet distance needs at least two images, and there are {images}: use evaluate.images=0, or more data"
        )
    features = load_features(options.features)
    objective: Any = bundle.objective()
    labels = [int(classes[held_out.label(i)]) for i in range(images)]
    seeds = (splitmix64(np.array([seed % 2**64], np.uint64)) ^ np.arange(images, dtype=np.uint64)).tolist()
    generated = []
    with ProgressBar("images", total=images) as bar:
        for start in range(0, images, options.batch):
            chosen = slice(start, start + options.batch)
            generated.append(objective.generate(model, labels[chosen], seeds[chosen]))
            bar.update(min(start + options.batch, images))
    evenly_spaced = np.arange(images) * other.num_rows // images
    image_features = {
        "held_out": features(np.stack([held_out.image(i) for i in range(images)])),
        GENERATED: features(np.concatenate(generated)),
        REAL: features(np.stack([other.image(int(i)) for i in evenly_spaced])),
        NOISE: features(random_images(images, held_out.image(0).shape, seed)),
    }
    metrics = distance_intervals(image_features, options.confidence, min(options.resamples, MAX_RESAMPLES), seed)
    return ImageEvaluation(options.features or RANDOM_FEATURES, images, metrics)


def describe_images(result: dict[str, Any]) -> str:
    """State what an `ImageEvaluation`, as plain values, measured."""
    return f"Fréchet distance of {result['images']:,} images from as many held-out ones, by features of {result['features']}"


def distance_intervals(features: Scores, confidence: float, resamples: int, seed: int) -> dict[str, Interval]:
    """Return the distances with the quantiles of their resamples, centered on each value.

    A resample has fewer different images, so its distance is biased upward: the mean of the resamples is subtracted.
    """
    resampled = [
        frechet_distances(select(features, indices))
        for indices in resample_indices(num_examples(features), resamples, seed)
    ]
    intervals = {}
    for name, value in frechet_distances(features).items():
        draws = np.array([draw[name] for draw in resampled])
        low, high = np.quantile(draws - draws.mean() + value, quantile_levels(confidence)).clip(min=0)
        intervals[name] = Interval(value, float(low), float(high))
    return intervals


def random_images(images: int, shape: Sequence[int], seed: int) -> np.ndarray:
    """Return images of uniform noise: uint8 [images, *shape]."""
    return np.random.default_rng(seed).integers(0, 256, (images, *shape), dtype=np.uint8)


def load_features(reference: str | None) -> Features:
    """Return the feature extractor of the bundle in a folder; None: the random convolution. Raises UserError."""
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
    def extract(images_NSSC: np.ndarray) -> np.ndarray:
        from PIL import Image

        features = []
        for start in range(0, len(images_NSSC), BATCH):
            scaled = [to_pixels(Image.fromarray(image), processor) for image in images_NSSC[start : start + BATCH]]
            inputs = torch.from_numpy(normalize(np.stack(scaled), processor))
            states: Tensor = model.base_model(pixel_values=inputs).last_hidden_state  # type: ignore[operator]
            features.append(states.flatten(2).mean(2) if states.ndim == 4 else states.mean(1))
        return torch.cat(features).double().numpy()

    return extract


@torch.inference_mode()
def random_features(images_NSSC: np.ndarray) -> np.ndarray:
    """Return the outputs of two convolutions with random weights, averaged over the image: float64 [N, 64].

    Such features separate distributions of images fairly well (Naeem et al. 2020, https://arxiv.org/abs/2002.09797, section 3).
    """
    generator = np.random.Generator(np.random.Philox(key=0))
    kernels = [
        torch.from_numpy(generator.standard_normal((out, into, 5, 5), dtype=np.float32) * math.sqrt(2 / (25 * into)))
        for into, out in pairwise(WIDTHS)
    ]
    features = []
    for start in range(0, len(images_NSSC), BATCH):
        hidden = torch.from_numpy(images_NSSC[start : start + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
        for kernel in kernels:
            hidden = F.conv2d(hidden, kernel, stride=2, padding=2).relu()
        features.append(hidden.flatten(2).mean(2))
    return torch.cat(features).double().numpy()


def frechet_distances(features: Scores) -> dict[str, float]:
    """Return the Fréchet distances from the held-out images: of generated images, of other real ones, and of noise."""
    mean, covariance = moments(features["held_out"])
    root = sqrt_covariance(covariance)
    distances = {}
    for name, images in (("frechet_distance", GENERATED), ("frechet_distance_of_real", REAL), ("frechet_distance_of_noise", NOISE)):  # fmt: skip
        other_mean, other_covariance = moments(features[images])
        trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(min=0)).sum()
        squared_distance = float(((mean - other_mean) ** 2).sum())
        traces = float(np.trace(covariance) + np.trace(other_covariance) - 2 * trace_of_root)
        distances[name] = max(squared_distance + traces, 0.0)
    return distances


def moments(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the covariance of features."""
    return features_ND.mean(0), np.cov(features_ND, rowvar=False)


def sqrt_covariance(matrix: np.ndarray) -> np.ndarray:
    """Return the square root of a covariance matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root

"""The Fréchet distance against its formula in SciPy, its intervals, and the random features."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from engine.evaluate.frechet_distance import distance_intervals, frechet_distances, random_features


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, equation 6."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root))


def test_distance_equals_its_definition() -> None:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(12, 12))
    held_out, generated = generator.normal(size=(200, 12)) @ mixing, generator.normal(size=(200, 12)) + 0.3
    found = frechet_distances(
        {"held_out": held_out, "generated": generated, "real": held_out[::-1], "noise": 5 * generated}
    )
    assert found["frechet_distance"] == pytest.approx(by_definition(held_out, generated), rel=1e-6)
    assert found["frechet_distance_of_noise"] == pytest.approx(by_definition(held_out, 5 * generated), rel=1e-6)
    assert found["frechet_distance_of_real"] == pytest.approx(0, abs=1e-6)
    fewer = frechet_distances(
        {
            name: features[:8]
            for name, features in {
                "held_out": held_out,
                "generated": generated,
                "real": generated,
                "noise": generated,
            }.items()
        }
    )
    assert fewer["frechet_distance"] == pytest.approx(
        by_definition(held_out[:8], generated[:8]), rel=1e-3
    )  # not of full rank


def test_intervals_contain_the_value_and_narrow_with_more_images() -> None:
    def of(count: int) -> tuple[float, float, float]:
        generator = np.random.default_rng(1)
        sets = {
            name: generator.normal(shift, 1, (count, 6))
            for name, shift in (("held_out", 0), ("generated", 1), ("real", 0), ("noise", 3))
        }
        found = distance_intervals(sets, 0.95, 200, seed=0)
        assert found["frechet_distance_of_real"].value < found["frechet_distance"].value
        assert found["frechet_distance"].value < found["frechet_distance_of_noise"].value
        distance = found["frechet_distance"]
        return distance.low, distance.value, distance.high

    few, many = of(100), of(2000)
    assert few[0] < few[1] < few[2]
    assert many[2] - many[0] < (few[2] - few[0]) / 2
    assert many[0] < 6 < many[2] or many[1] == pytest.approx(6, rel=0.05)  # six means one apart, equal covariances


def test_random_features_are_deterministic_and_separate_blur_from_noise() -> None:
    generator = np.random.default_rng(2)
    coarse = generator.integers(0, 256, (64, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    noise = generator.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    features = random_features(coarse)
    assert features.shape == (64, 64)
    assert np.array_equal(features[:5], random_features(coarse)[:5])
    # The same brightness on average, but another texture.
    apart, spread = features.mean(0) - random_features(noise).mean(0), features.std(0)
    assert np.abs(apart / spread).max() > 3

"""PB2's explore function: a Gaussian process (GP) over params and time proposes the params after an exploit.

Parker-Holder et al. 2020, https://arxiv.org/abs/2002.02518, algorithm 1 and section 4: the GP models how much the metric
improves in a round with given params. Its kernel is a squared exponential over the params times (1 - forgetting) to the
power of half the rounds in cross. For several choices in one round, earlier ones are added to the GP's data at their
predicted mean, so that choices differ. Listed values are chosen as in PBT, as in the paper.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from engine.sweep.population import Explore, Round, perturb_value
from engine.sweep.search_space import SearchSpace

NUM_CANDIDATES = 1000
# hyperparameters to choose from, by maximum likelihood
LENGTH_SCALES, FORGETTING, NOISES = (0.1, 0.3, 1.0), (0.0, 0.1, 0.4), (0.01, 0.1)


def pb2_explore(space: SearchSpace, mode: str) -> Explore:
    """Return PB2's explore function for the numeric domains of a search space."""
    numbers = {key: domain for key, domain in space.items() if not domain.is_listed}

    def explore(
        rounds: list[Round], params: dict[str, Any], chosen: list[dict[str, Any]], generator: np.random.Generator
    ) -> dict[str, Any]:
        perturbed = {key: perturb_value(domain, params[key], generator) for key, domain in space.items()}
        points, gains = improvements(rounds, numbers, mode)
        if len(gains) < 2:
            return perturbed
        now = float(len(rounds))
        process = GaussianProcess.fit(points, (gains - gains.mean()) / (gains.std() or 1.0))
        for other in chosen:
            process = process.condition_on_mean(np.array([now, *(numbers[key].to_unit(other[key]) for key in numbers)]))
        candidates = np.column_stack([np.full(NUM_CANDIDATES, now), generator.random((NUM_CANDIDATES, len(numbers)))])
        mean, deviation = process.predict(candidates)
        confidence = np.sqrt(0.2 * len(numbers) * np.log(2 * max(2.0, len(gains))))
        best = candidates[int(np.argmax(mean + confidence * deviation)), 1:]
        return perturbed | {
            key: domain.value_at(float(position)) for (key, domain), position in zip(numbers.items(), best, strict=True)
        }

    return explore


def improvements(rounds: list[Round], numbers: SearchSpace, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (round, normalized params) and the gain, for each member and round with a metric before and after."""
    sign = -1.0 if mode == "min" else 1.0
    points, gains = [], []
    for number, result in enumerate(rounds):
        for params, before, after in zip(result.params, result.before, result.after, strict=True):
            if before is not None and after is not None:
                points.append([float(number), *(numbers[key].to_unit(params[key]) for key in numbers)])
                gains.append(sign * (after - before))
    return np.array(points), np.array(gains)


class GaussianProcess:
    """A Gaussian process over points (round, params normalized to [0, 1])."""

    def __init__(
        self, points: np.ndarray, gains: np.ndarray, length_scale: float, forgetting: float, noise: float
    ) -> None:
        """Condition on `points` [n, 1 + params] and their normalized `gains` [n]."""
        self._points, self._gains, self._hyperparameters = points, gains, (length_scale, forgetting, noise)
        self._cholesky = np.linalg.cholesky(self._kernel(points, points) + noise * np.eye(len(points)))
        self._weights = np.linalg.solve(self._cholesky.T, np.linalg.solve(self._cholesky, gains))

    @classmethod
    def fit(cls, points: np.ndarray, gains: np.ndarray) -> GaussianProcess:
        """Return the process with the length scale, forgetting and noise of maximum likelihood."""
        candidates = [cls(points, gains, *values) for values in itertools.product(LENGTH_SCALES, FORGETTING, NOISES)]
        return max(candidates, key=GaussianProcess.log_likelihood)

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        length_scale, forgetting, _ = self._hyperparameters
        squares = ((a[:, None, 1:] - b[None, :, 1:]) ** 2).sum(-1)
        rounds = np.abs(a[:, None, 0] - b[None, :, 0])
        kernel: np.ndarray = np.exp(-squares / (2 * length_scale**2)) * (1 - forgetting) ** (rounds / 2)
        return kernel

    def log_likelihood(self) -> float:
        """Return the log marginal likelihood of the gains, up to a constant."""
        return float(-0.5 * self._gains @ self._weights - np.log(np.diag(self._cholesky)).sum())

    def condition_on_mean(self, point: np.ndarray) -> GaussianProcess:
        """Return the process conditioned on one more point, at its predicted mean."""
        mean, _ = self.predict(point[None])
        return GaussianProcess(np.vstack([self._points, point]), np.append(self._gains, mean), *self._hyperparameters)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation at each point."""
        cross = self._kernel(points, self._points)
        reduced = np.linalg.solve(self._cholesky, cross.T)
        return cross @ self._weights, np.sqrt(np.maximum(0.0, 1.0 - (reduced**2).sum(0)))

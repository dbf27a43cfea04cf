"""PB2's exploration: a Gaussian process over values and time proposes what a model that exploits goes on with.

Parker-Holder et al. 2020, https://arxiv.org/abs/2002.02518, algorithm 1 and section 4: the process models how much a round
with some values improves the metric. Its kernel is a squared exponential over the values times (1 - forgetting) to the power
of half the rounds in between; several choices of one round are made by treating those made already as seen, at their
predicted mean (so they differ). Listed values are chosen as PBT does, as in the paper.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from engine.sweep.population import Explore, Round, perturb_value
from engine.sweep.search_space import SearchSpace

NUM_CANDIDATES = 1000
LENGTH_SCALES, FORGETTING, NOISES = (0.1, 0.3, 1.0), (0.0, 0.1, 0.4), (0.01, 0.1)  # of which the likeliest are taken


def pb2_explore(space: SearchSpace, mode: str) -> Explore:
    """Return the exploration of PB2 over the numbers of a space."""
    numbers = {key: domain for key, domain in space.items() if not domain.listed}

    def explore(
        rounds: list[Round], params: dict[str, Any], chosen: list[dict[str, Any]], generator: np.random.Generator
    ) -> dict[str, Any]:
        found = {key: perturb_value(domain, params[key], generator) for key, domain in space.items()}
        seen, gains = improvements(rounds, numbers, mode)
        if len(gains) < 2:
            return found
        now = float(len(rounds))
        process = GaussianProcess.likeliest(seen, (gains - gains.mean()) / (gains.std() or 1.0))
        for other in chosen:
            process = process.with_point(np.array([now, *(numbers[key].place(other[key]) for key in numbers)]))
        candidates = np.column_stack([np.full(NUM_CANDIDATES, now), generator.random((NUM_CANDIDATES, len(numbers)))])
        mean, deviation = process.predict(candidates)
        confidence = np.sqrt(0.2 * len(numbers) * np.log(2 * max(2.0, len(gains))))
        best = candidates[int(np.argmax(mean + confidence * deviation)), 1:]
        return found | {
            key: domain.at(float(place)) for (key, domain), place in zip(numbers.items(), best, strict=True)
        }

    return explore


def improvements(rounds: list[Round], numbers: SearchSpace, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each member and round with a figure before and after, (round, places of the values) and the gain."""
    sign = -1.0 if mode == "min" else 1.0
    seen, gains = [], []
    for at, past in enumerate(rounds):
        for params, before, after in zip(past.params, past.before, past.after, strict=True):
            if before is not None and after is not None:
                seen.append([float(at), *(numbers[key].place(params[key]) for key in numbers)])
                gains.append(sign * (after - before))
    return np.array(seen), np.array(gains)


class GaussianProcess:
    """A Gaussian process over points (round, places of the values in [0, 1])."""

    def __init__(self, seen: np.ndarray, gains: np.ndarray, length: float, forgetting: float, noise: float) -> None:
        """Condition on `seen` [n, 1 + values] and their normalized `gains` [n]."""
        self._seen, self._gains, self._parts = seen, gains, (length, forgetting, noise)
        self._root = np.linalg.cholesky(self._kernel(seen, seen) + noise * np.eye(len(seen)))
        self._weights = np.linalg.solve(self._root.T, np.linalg.solve(self._root, gains))

    @classmethod
    def likeliest(cls, seen: np.ndarray, gains: np.ndarray) -> GaussianProcess:
        """Return the process whose length, forgetting and noise make the gains likeliest."""
        tried = [cls(seen, gains, *parts) for parts in itertools.product(LENGTH_SCALES, FORGETTING, NOISES)]
        return max(tried, key=GaussianProcess.log_likelihood)

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        length, forgetting, _ = self._parts
        squares = ((a[:, None, 1:] - b[None, :, 1:]) ** 2).sum(-1)
        rounds = np.abs(a[:, None, 0] - b[None, :, 0])
        kernel: np.ndarray = np.exp(-squares / (2 * length**2)) * (1 - forgetting) ** (rounds / 2)
        return kernel

    def log_likelihood(self) -> float:
        """Return the logarithm of the gains' density, but for a constant."""
        return float(-0.5 * self._gains @ self._weights - np.log(np.diag(self._root)).sum())

    def with_point(self, point: np.ndarray) -> GaussianProcess:
        """Return the process that has seen its own mean at one more point."""
        mean, _ = self.predict(point[None])
        return GaussianProcess(np.vstack([self._seen, point]), np.append(self._gains, mean), *self._parts)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation at each of the points."""
        between = self._kernel(points, self._seen)
        reduced = np.linalg.solve(self._root, between.T)
        return between @ self._weights, np.sqrt(np.maximum(0.0, 1.0 - (reduced**2).sum(0)))

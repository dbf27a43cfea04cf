"""PB2's Gaussian process: its predictions, and the params that it suggests in a simulated population."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.config import Config
from engine.sweep.gaussian_process import GaussianProcess, improvements, pb2_explore
from engine.sweep.population import Round
from engine.sweep.search_space import parse_search_space
from tests.engine.sweep.test_population import SPACE, configured, simulate


def test_pb2_finds_the_params_that_improve_most(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny, scheduler="pb2", trials=8, space={"optim.lr": SPACE["optim.lr"]}, perturbation_interval=1)
    space = parse_search_space(config)
    simulated = simulate(config, tmp_path, 11, pb2_explore(space, "max"))
    late = [abs(np.log10(e.params["optim.lr"]) + 2) for e in simulated.state.exploits if e.step > 5]
    assert float(np.median(late)) < 0.35  # about 1 for random choices
    chosen = [e.params["optim.lr"] for e in simulated.state.exploits if e.step == 3]
    assert len(set(chosen)) == len(chosen)


def test_a_gain_is_the_difference_within_a_round(tiny: Config) -> None:
    space = parse_search_space(configured(tiny, space={"optim.lr": SPACE["optim.lr"]}))
    params = [{"optim.lr": 1e-4}, {"optim.lr": 1.0}]
    rounds = [Round(params, [None, None], [3.0, 2.0]), Round(params, [2.0, 2.0], [1.5, None])]
    points, gains = improvements(rounds, space, "min")
    assert points.tolist() == [[1.0, 0.0]]
    assert gains.tolist() == [0.5]


def test_a_gaussian_process_is_certain_near_its_data() -> None:
    points = np.array([[0.0, 0.1], [0.0, 0.9], [1.0, 0.5]])
    process = GaussianProcess.fit(points, np.array([1.0, -1.0, 0.0]))
    mean, deviation = process.predict(np.array([[0.0, 0.1], [9.0, 0.1]]))
    assert mean[0] == pytest.approx(1.0, abs=0.2)
    assert deviation[0] < deviation[1] or deviation[0] < 0.4

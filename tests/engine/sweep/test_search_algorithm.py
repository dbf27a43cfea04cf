"""Independent trials: tasks, stopping, failures, and resuming from the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.sweep.list_searcher import ListSearcher
from engine.sweep.search_algorithm import IndependentTrials, trial_name
from engine.sweep.stopping import MedianStoppingRule, StoppingRule
from engine.sweep.trial_record import TrialTask, read_trial


def place_trial(params: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Refuse a learning rate of 9, and give the others a micro-batch."""
    if params["optim.lr"] == 9:
        raise UserError("it does not fit")
    return params | {"train.micro_batch": 2}, Path("data")


@pytest.fixture
def config(tiny: Config) -> Config:
    return with_values(tiny, {"name": "s", "train.max_steps": 6})


def make(config: Config, folder: Path, rates: list[float], rule: StoppingRule | None = None) -> IndependentTrials:
    searcher = ListSearcher([{"optim.lr": rate} for rate in rates])
    return IndependentTrials(config, folder, ["loss"], searcher, rule or StoppingRule("min"), place_trial)


def test_tasks_have_fitting_params_and_refused_trials_are_skipped(config: Config, tmp_path: Path) -> None:
    algorithm = make(config, tmp_path, [9, 0.1])
    task = algorithm.next_task()
    assert task == TrialTask(1, trial_name(config, 1), {"optim.lr": 0.1, "train.micro_batch": 2}, 0, 6, "data")
    refused = read_trial(tmp_path / "s-000")
    assert refused is not None
    assert (refused.state, refused.reason) == ("refused", "it does not fit")
    assert algorithm.is_done
    assert algorithm.next_task() is None


def test_a_stopped_and_a_failed_trial_are_recorded(config: Config, tmp_path: Path) -> None:
    algorithm = make(config, tmp_path, [0.1, 0.2, 0.3, 0.4], MedianStoppingRule("min", 2, min_trials=2))
    for _ in range(4):
        assert algorithm.next_task()
    for index, value in enumerate((1.0, 2.0, 9.0)):
        assert algorithm.on_report(index, 2, {"loss": value}, process=7) == (index == 2)
    assert algorithm.on_report(2, 4, {"loss": 0.0}, process=7)  # a stopped trial stays stopped
    algorithm.on_end(2, None)
    algorithm.on_end(3, "out of memory")
    states = [(trial.state, trial.reason) for trial in map(read_trial, sorted(tmp_path.iterdir())) if trial]
    assert states == [("stopped early", ""), ("failed", "out of memory")]


def test_a_finished_trial_has_its_best_value_if_that_checkpoint_is_kept(config: Config, tmp_path: Path) -> None:
    algorithm = make(with_values(config, {"train.keep_best": True, "train.evaluate_every": 1}), tmp_path, [0.1])
    algorithm.next_task()
    for step, value in ((2, 3.0), (4, 1.0), (6, 2.0)):
        algorithm.on_report(0, step, {"loss": value}, process=7)
    algorithm.on_end(0, None)
    assert algorithm.trials[0].value == 1.0


def test_a_resumed_search_starts_only_trials_without_a_record(config: Config, tmp_path: Path) -> None:
    first = make(config, tmp_path, [0.1, 0.2])
    first.next_task()
    first.on_report(0, 6, {"loss": 1.0}, process=7)
    first.on_end(0, None)
    first.next_task()  # interrupted: no record
    resumed = make(config, tmp_path, [0.1, 0.2])
    assert resumed.trials == {0: first.trials[0]}
    task = resumed.next_task()
    assert task is not None
    assert task.index == 1
    longer = make(with_values(config, {"train.max_steps": 12}), tmp_path, [0.1, 0.2])
    assert longer.trials == {}  # a record of another number of steps does not count

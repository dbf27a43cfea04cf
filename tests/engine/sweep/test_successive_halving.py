"""Successive halving on simulated trials: promotions, cost, and resuming after a kill."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, with_values
from engine.sweep.list_searcher import ListSearcher
from engine.sweep.stopping import rungs
from engine.sweep.successive_halving import SuccessiveHalving
from engine.sweep.trial_record import PAUSED, TrialTask


def make_halving(config: Config, folder: Path, trials: int, mode: str = "min", **values: Any) -> SuccessiveHalving:
    """Return a search over `trials` trials of 64 steps with rungs at 4 and 16."""
    options = {"sweep.scheduler": "asha", "sweep.reduction_factor": 4, "sweep.grace_steps": 4, "train.max_steps": 64}
    config = with_values(config, options | {f"sweep.{name}": value for name, value in values.items()})
    params = [{"optim.lr": 1e-3} for _ in range(trials)]
    return SuccessiveHalving(config, folder, ["loss"], ListSearcher(params), mode, lambda p: (p, folder), rungs(config))


def step(halving: SuccessiveHalving, task: TrialTask, value: float) -> None:
    """End a task with this value of the metric."""
    halving.on_report(task.index, task.end_step, {"loss": value}, 1)
    halving.on_end(task.index, None)


def simulate(halving: SuccessiveHalving, values: list[float], slots: int = 2, max_tasks: int = 10**6) -> int:
    """Run tasks, `slots` at a time and in random order, until all or `max_tasks` are done; return the number of steps."""
    steps, running, rng = 0, list[TrialTask](), random.Random(0)
    while not halving.is_done and max_tasks:
        while len(running) < slots and (task := halving.next_task()) is not None:
            running.append(task)
        task = running.pop(rng.randrange(len(running)))
        steps, max_tasks = steps + task.end_step - task.start_step, max_tasks - 1
        step(halving, task, values[task.index] + 1 / task.end_step)
    return steps


def test_a_trial_is_promoted_once_it_is_among_the_best(tiny: Config, tmp_path: Path) -> None:
    halving = make_halving(tiny, tmp_path, 8)
    for index, value in enumerate([3.0, 1.0, 2.0]):
        task = halving.next_task()
        assert task is not None
        assert (task.index, task.start_step, task.end_step) == (index, 0, 4)
        step(halving, task, value)
    fourth = halving.next_task()
    assert fourth is not None
    assert fourth.index == 3  # the best quarter of three trials is empty
    step(halving, fourth, 4.0)
    best = halving.next_task()
    assert best is not None
    assert (best.index, best.start_step, best.end_step) == (1, 4, 16)
    assert [halving.trials[i].state for i in range(4)] == [PAUSED, "running", PAUSED, PAUSED]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_sixteen_trials_take_a_fifth_of_the_steps_and_find_the_best(tiny: Config, tmp_path: Path, mode: str) -> None:
    values = [random.Random(i).random() for i in range(16)]
    halving = make_halving(tiny, tmp_path, 16, mode)
    steps = simulate(halving, values)
    assert steps <= 0.2 * 16 * 64
    best = (min if mode == "min" else max)(range(16), key=lambda i: values[i])
    states = Counter(trial.state for trial in halving.trials.values())
    assert halving.trials[best].state == "finished"
    assert halving.trials[best].steps == 64
    assert states["finished"] + states["stopped early"] == 16


def test_as_many_trials_finish_as_the_soup_needs(tiny: Config, tmp_path: Path) -> None:
    halving = make_halving(tiny, tmp_path, 8, soup=3)
    simulate(halving, [0.1 * i for i in range(8)])
    assert sorted(i for i, trial in halving.trials.items() if trial.state == "finished") == [0, 1, 2]


def test_the_next_best_trial_replaces_a_failed_one(tiny: Config, tmp_path: Path) -> None:
    halving = make_halving(tiny, tmp_path, 2)
    for value in (1.0, 2.0):
        task = halving.next_task()
        assert task is not None
        step(halving, task, value)
    task = halving.next_task()
    assert task is not None
    assert task.index == 0
    halving.on_end(0, "out of memory")
    assert halving.trials[0].state == "failed"
    simulate(halving, [1.0, 2.0])
    assert halving.trials[1].state == "finished"


def test_each_hyperband_bracket_starts_one_rung_later(tiny: Config, tmp_path: Path) -> None:
    halving = make_halving(tiny, tmp_path, 6, scheduler="hyperband")
    tasks = [halving.next_task() for _ in range(6)]
    assert [task.end_step for task in tasks if task] == [4, 16, 64] * 2
    for task in tasks:
        assert task is not None
        step(halving, task, float(task.index))
    simulate(halving, [float(i) for i in range(6)])
    finished = [i for i, trial in halving.trials.items() if trial.state == "finished"]
    assert finished == [0, 1, 2, 5]  # the best of each bracket, and all of the last, which stops none


def test_paused_trials_resume_after_a_kill(tiny: Config, tmp_path: Path) -> None:
    values = [random.Random(i).random() for i in range(16)]
    uninterrupted, interrupted = (
        make_halving(tiny, tmp_path / "uninterrupted", 16),
        make_halving(tiny, tmp_path / "interrupted", 16),
    )
    simulate(uninterrupted, values, slots=1)
    simulate(interrupted, values, slots=1, max_tasks=9)
    resumed = make_halving(tiny, tmp_path / "interrupted", 16)
    assert resumed.trials == interrupted.trials
    simulate(resumed, values, slots=1)
    assert [(t.state, t.steps, t.curve) for t in resumed.trials.values()] == [
        (t.state, t.steps, t.curve) for t in uninterrupted.trials.values()
    ]

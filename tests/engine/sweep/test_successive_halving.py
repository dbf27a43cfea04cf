"""Successive halving on made-up trials: who goes on, what it costs, and going on after a kill."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, with_values
from engine.sweep.successive_halving import SuccessiveHalving
from engine.sweep.trial_record import PAUSED
from engine.sweep.searchers import ListSearcher
from engine.sweep.stopping import rungs


def course(config: Config, folder: Path, trials: int, mode: str = "min", **values: Any) -> SuccessiveHalving:
    """Make a course over so many trials of 64 steps with rungs at 4 and 16."""
    given = {"sweep.scheduler": "asha", "sweep.reduction": 4, "sweep.grace_steps": 4, "train.max_steps": 64}
    config = with_values(config, given | {f"sweep.{name}": value for name, value in values.items()})
    params = [{"optim.lr": 1e-3} for _ in range(trials)]
    return SuccessiveHalving(config, folder, ["loss"], ListSearcher(params), mode, lambda p: (p, folder), rungs(config))


def step(halving: SuccessiveHalving, task: dict[str, Any], value: float) -> None:
    """Carry out a task at whose end a trial has this value."""
    halving.report(task["index"], task["until"], {"loss": value}, 1)
    halving.end(task["index"], None)


def simulate(halving: SuccessiveHalving, values: list[float], slots: int = 2, most: int = 10**6) -> int:
    """Carry out tasks, `slots` at a time and in a random order, until all or `most` are done; return the steps."""
    taken, running, chosen = 0, list[dict[str, Any]](), random.Random(0)
    while not halving.done and most:
        while len(running) < slots and (task := halving.next()) is not None:
            running.append(task)
        task = running.pop(chosen.randrange(len(running)))
        taken, most = taken + task["until"] - task["since"], most - 1
        step(halving, task, values[task["index"]] + 1 / task["until"])
    return taken


def test_a_trial_goes_on_once_it_is_among_the_best(tiny: Config, tmp_path: Path) -> None:
    halving = course(tiny, tmp_path, 8)
    for index, value in enumerate([3.0, 1.0, 2.0]):
        task = halving.next()
        assert task is not None
        assert (task["index"], task["since"], task["until"]) == (index, 0, 4)
        step(halving, task, value)
    fourth = halving.next()
    assert fourth is not None
    assert fourth["index"] == 3  # of three none is the best quarter
    step(halving, fourth, 4.0)
    best = halving.next()
    assert best is not None
    assert (best["index"], best["since"], best["until"]) == (1, 4, 16)
    assert [halving.trials[i].state for i in range(4)] == [PAUSED, "running", PAUSED, PAUSED]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_sixteen_trials_take_a_ninth_of_the_steps_and_end_with_the_best(
    tiny: Config, tmp_path: Path, mode: str
) -> None:
    values = [random.Random(i).random() for i in range(16)]
    halving = course(tiny, tmp_path, 16, mode)
    taken = simulate(halving, values)
    assert taken <= 0.2 * 16 * 64
    best = (min if mode == "min" else max)(range(16), key=lambda i: values[i])
    states = Counter(trial.state for trial in halving.trials.values())
    assert halving.trials[best].state == "finished"
    assert halving.trials[best].steps == 64
    assert states["finished"] + states["stopped early"] == 16


def test_as_many_come_to_the_end_as_a_soup_is_made_of(tiny: Config, tmp_path: Path) -> None:
    halving = course(tiny, tmp_path, 8, soup=3)
    simulate(halving, [0.1 * i for i in range(8)])
    assert sorted(i for i, trial in halving.trials.items() if trial.state == "finished") == [0, 1, 2]


def test_a_trial_that_fails_makes_room_for_the_next_best(tiny: Config, tmp_path: Path) -> None:
    halving = course(tiny, tmp_path, 2)
    for value in (1.0, 2.0):
        task = halving.next()
        assert task is not None
        step(halving, task, value)
    task = halving.next()
    assert task is not None
    assert task["index"] == 0
    halving.end(0, "out of memory")
    assert halving.trials[0].state == "failed"
    simulate(halving, [1.0, 2.0])
    assert halving.trials[1].state == "finished"


def test_hyperband_s_brackets_begin_one_rung_later_each(tiny: Config, tmp_path: Path) -> None:
    halving = course(tiny, tmp_path, 6, scheduler="hyperband")
    tasks = [halving.next() for _ in range(6)]
    assert [task["until"] for task in tasks if task] == [4, 16, 64] * 2
    for task in tasks:
        assert task is not None
        step(halving, task, float(task["index"]))
    simulate(halving, [float(i) for i in range(6)])
    finished = [i for i, trial in halving.trials.items() if trial.state == "finished"]
    assert finished == [0, 1, 2, 5]  # the best of each bracket, and all of the one that stops none


def test_after_a_kill_it_goes_on_with_those_that_waited(tiny: Config, tmp_path: Path) -> None:
    values = [random.Random(i).random() for i in range(16)]
    whole, cut = course(tiny, tmp_path / "whole", 16), course(tiny, tmp_path / "cut", 16)
    simulate(whole, values, slots=1)
    simulate(cut, values, slots=1, most=9)
    again = course(tiny, tmp_path / "cut", 16)
    assert again.trials == cut.trials
    simulate(again, values, slots=1)
    assert [(t.state, t.steps, t.curve) for t in again.trials.values()] == [
        (t.state, t.steps, t.curve) for t in whole.trials.values()
    ]

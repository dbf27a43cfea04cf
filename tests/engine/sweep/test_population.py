"""Who copies whom, what changes, and that a population goes on after a kill: on made-up figures, and on real checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.sweep.gaussian_process import GaussianProcess, pb2_explore, improvements
from engine.sweep.population import STATE_FILE, PopulationBasedTraining, Round, select_exploits, pbt_explore, perturb_value
from engine.sweep.search_space import Domain, parse_search_space

SPACE = {
    "optim.lr": {"loguniform": [1e-4, 1.0]},
    "optim.beta1": {"uniform": [0.8, 0.99]},
    "train.global_batch": {"choice": [4, 8, 16]},
}


@pytest.mark.parametrize(
    ("after", "mode", "members", "donors"),
    [
        ([4.0, 3.0, 2.0, 1.0], "min", [0], {3}),
        ([4.0, 3.0, 2.0, 1.0], "max", [3], {0}),
        ([1.0, 1.0, 1.0, 1.0], "min", [], set()),
        ([None, 3.0, None, 1.0], "min", [0, 2], {3}),
        ([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "min", [0, 1], {6, 7}),
    ],
)
def test_the_worst_copy_the_best(after: list[float | None], mode: str, members: list[int], donors: set[int]) -> None:
    found = select_exploits(after, mode, 0.25, [0])
    assert sorted(member for member, _ in found) == members
    assert {donor for _, donor in found} <= donors
    assert found == select_exploits(after, mode, 0.25, [0])


def test_a_perturbed_value_stays_near_and_inside() -> None:
    generator = np.random.default_rng(0)
    moved = [perturb_value(Domain("loguniform", (1e-4, 1.0)), 0.01, generator) for _ in range(200)]
    assert {0.008, 0.012} <= {round(value, 6) for value in moved}
    assert all(1e-4 <= value <= 1.0 for value in moved)
    assert {perturb_value(Domain("randint", (1, 4)), 3, generator) for _ in range(100)} == {1, 2, 3}
    assert {perturb_value(Domain("choice", (4, 8, 16)), 16, generator) for _ in range(100)} == {4, 8, 16}


def play(config: Config, folder: Path, rounds: int, explore: Any = None) -> PopulationBasedTraining:
    """Play some rounds with made-up figures: a gain of lr in each, members that copied begin where the donor was."""
    space = parse_search_space(config)
    course = PopulationBasedTraining(config, folder, ["loss"], "max", space, lambda p: (p, Path("data")), explore or pbt_explore(space))
    while len(course.state.rounds) < rounds and not course.done:
        task = course.next()
        assert task is not None
        index, name = task["index"], task["name"]
        step = folder / name / "checkpoints" / f"step-{task['until']:08d}"
        step.mkdir(parents=True, exist_ok=True)
        file = folder / name / "level"
        source = sorted((folder / name / "checkpoints").glob("step-*/level"))
        level = float(source[-1].read_text()) if source else 0.0
        value = level + 1 - abs(math.log10(task["params"]["optim.lr"]) + 2)
        (step / "level").write_text(str(value))
        (folder / name / "metrics.jsonl").write_text(json.dumps({"step": task["until"]}) + "\n")
        file.unlink(missing_ok=True)
        course.report(index, task["until"], {"loss": value}, 1)
        course.end(index, None)
    return course


def configured(tiny: Config, **sweep: Any) -> Config:
    values = {"space": SPACE, "trials": 6, "scheduler": "pbt", "interval": 2, **sweep}
    return with_values(tiny, {"train.max_steps": 12, **{f"sweep.{key}": value for key, value in values.items()}})


def test_a_population_goes_on_with_the_round_under_way(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny)
    whole = play(config, tmp_path / "whole", 5)
    halted = play(config, tmp_path / "halted", 2)
    task = halted.next()
    assert task is not None
    assert (task["since"], task["until"]) == (4, 6)
    resumed = play(config, tmp_path / "halted", 5)  # another process: that member's round was lost, no other's
    for trial in (*resumed.trials.values(), *whole.trials.values()):
        trial.seconds = 0.0
    assert resumed.state == whole.state
    assert len(whole.state.exploits) == 5
    assert {e.step for e in whole.state.exploits} == {2, 4, 6, 8, 10}


def test_an_exploit_that_a_kill_cut_short_is_done_again(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny)
    course = play(config, tmp_path, 1)
    exploit = course.state.exploits[0]
    donor, clone = (
        tmp_path / course.trials[i].name / "checkpoints" / "step-00000002" for i in (exploit.donor, exploit.member)
    )
    assert (clone / "level").read_text() == (donor / "level").read_text()
    (clone / "level").write_text("half")
    tree = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps(tree | {"copied": False}))
    play(config, tmp_path, 1)
    assert (clone / "level").read_text() == (donor / "level").read_text()


def test_a_population_of_another_length_is_refused(tiny: Config, tmp_path: Path) -> None:
    play(configured(tiny), tmp_path, 1)
    with pytest.raises(UserError, match="trained for 12 steps in rounds of 2"):
        play(configured(tiny, interval=3), tmp_path, 1)


def test_a_member_that_failed_is_replaced_and_a_population_without_any_ends(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny, trials=2)
    course = play(config, tmp_path / "one", 0)
    for index, reason in ((0, "step 1: no number"), (1, None)):
        task = course.next()
        assert task is not None
        (tmp_path / "one" / task["name"] / "checkpoints" / "step-00000002").mkdir(parents=True)
        (tmp_path / "one" / task["name"] / "metrics.jsonl").touch()
        course.report(index, 2, {"loss": 1.0}, 1)
        course.end(index, reason)
    assert [(e.member, e.donor) for e in course.state.exploits] == [(0, 1)]
    none_left = play(config, tmp_path / "none", 0)
    for index in (0, 1):
        none_left.next()
        none_left.end(index, "step 1: no number")
    assert none_left.done
    assert [trial.state for trial in none_left.trials.values()] == ["failed", "failed"]


def test_the_bandit_finds_what_improves_most(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny, scheduler="pb2", trials=8, space={"optim.lr": SPACE["optim.lr"]}, interval=1)
    space = parse_search_space(config)
    played = play(config, tmp_path, 11, pb2_explore(space, "max"))
    late = [abs(np.log10(e.params["optim.lr"]) + 2) for e in played.state.exploits if e.step > 5]
    assert float(np.median(late)) < 0.35  # at random it would be 1
    chosen = [e.params["optim.lr"] for e in played.state.exploits if e.step == 3]
    assert len(set(chosen)) == len(chosen)


def test_a_gain_counts_from_where_the_weights_were(tiny: Config) -> None:
    space = parse_search_space(configured(tiny, space={"optim.lr": SPACE["optim.lr"]}))
    params = [{"optim.lr": 1e-4}, {"optim.lr": 1.0}]
    rounds = [Round(params, [None, None], [3.0, 2.0]), Round(params, [2.0, 2.0], [1.5, None])]
    seen, gains = improvements(rounds, space, "min")
    assert seen.tolist() == [[1.0, 0.0]]
    assert gains.tolist() == [0.5]


def test_a_process_is_sure_where_it_has_seen() -> None:
    seen = np.array([[0.0, 0.1], [0.0, 0.9], [1.0, 0.5]])
    process = GaussianProcess.likeliest(seen, np.array([1.0, -1.0, 0.0]))
    mean, deviation = process.predict(np.array([[0.0, 0.1], [9.0, 0.1]]))
    assert mean[0] == pytest.approx(1.0, abs=0.2)
    assert deviation[0] < deviation[1] or deviation[0] < 0.4

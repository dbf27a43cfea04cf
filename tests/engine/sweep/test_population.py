"""PBT and PB2 with simulated training: exploit, explore, and resuming after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.sweep.population import (
    STATE_FILE,
    PopulationBasedTraining,
    pbt_explore,
    perturb_value,
    select_exploits,
)
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
def test_the_worst_members_copy_the_best(
    after: list[float | None], mode: str, members: list[int], donors: set[int]
) -> None:
    exploits = select_exploits(after, mode, 0.25, [0])
    assert sorted(member for member, _ in exploits) == members
    assert {donor for _, donor in exploits} <= donors
    assert exploits == select_exploits(after, mode, 0.25, [0])


def test_a_perturbed_value_stays_close_and_within_its_domain() -> None:
    generator = np.random.default_rng(0)
    perturbed = [perturb_value(Domain("loguniform", (1e-4, 1.0)), 0.01, generator) for _ in range(200)]
    assert {0.008, 0.012} <= {round(value, 6) for value in perturbed}
    assert all(1e-4 <= value <= 1.0 for value in perturbed)
    assert {perturb_value(Domain("randint", (1, 4)), 3, generator) for _ in range(100)} == {1, 2, 3}
    assert {perturb_value(Domain("choice", (4, 8, 16)), 16, generator) for _ in range(100)} == {4, 8, 16}


def simulate(config: Config, folder: Path, rounds: int, explore: Any = None) -> PopulationBasedTraining:
    """Simulate rounds: each adds a gain that depends on lr; a member that exploits starts at the donor's level."""
    space = parse_search_space(config)
    pbt = PopulationBasedTraining(
        config, folder, ["loss"], "max", space, lambda p: (p, Path("data")), explore or pbt_explore(space)
    )
    while len(pbt.state.rounds) < rounds and not pbt.is_done:
        task = pbt.next_task()
        assert task is not None
        index, name = task.index, task.name
        step = folder / name / "checkpoints" / f"step-{task.end_step:08d}"
        step.mkdir(parents=True, exist_ok=True)
        file = folder / name / "level"
        source = sorted((folder / name / "checkpoints").glob("step-*/level"))
        level = float(source[-1].read_text()) if source else 0.0
        value = level + 1 - abs(math.log10(task.params["optim.lr"]) + 2)
        (step / "level").write_text(str(value))
        (folder / name / "metrics.jsonl").write_text(json.dumps({"step": task.end_step}) + "\n")
        file.unlink(missing_ok=True)
        pbt.on_report(index, task.end_step, {"loss": value}, 1)
        pbt.on_end(index, None)
    return pbt


def configured(tiny: Config, **sweep: Any) -> Config:
    values = {"space": SPACE, "trials": 6, "scheduler": "pbt", "perturbation_interval": 2, **sweep}
    return with_values(tiny, {"train.max_steps": 12, **{f"sweep.{key}": value for key, value in values.items()}})


def test_a_population_resumes_the_current_round(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny)
    uninterrupted = simulate(config, tmp_path / "uninterrupted", 5)
    interrupted = simulate(config, tmp_path / "interrupted", 2)
    task = interrupted.next_task()
    assert task is not None
    assert (task.start_step, task.end_step) == (4, 6)
    resumed = simulate(config, tmp_path / "interrupted", 5)  # in another process: only that member's round is repeated
    for trial in (*resumed.trials.values(), *uninterrupted.trials.values()):
        trial.seconds = 0.0
    assert resumed.state == uninterrupted.state
    assert len(uninterrupted.state.exploits) == 5
    assert {e.step for e in uninterrupted.state.exploits} == {2, 4, 6, 8, 10}


def test_an_interrupted_exploit_is_repeated(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny)
    pbt = simulate(config, tmp_path, 1)
    exploit = pbt.state.exploits[0]
    donor, member = (
        tmp_path / pbt.trials[i].name / "checkpoints" / "step-00000002" for i in (exploit.donor, exploit.member)
    )
    assert (member / "level").read_text() == (donor / "level").read_text()
    (member / "level").write_text("half")
    tree = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps(tree | {"copied": False}))
    simulate(config, tmp_path, 1)
    assert (member / "level").read_text() == (donor / "level").read_text()


def test_resuming_a_population_with_another_round_length_is_refused(tiny: Config, tmp_path: Path) -> None:
    simulate(configured(tiny), tmp_path, 1)
    with pytest.raises(UserError, match="trained for 12 steps in rounds of 2"):
        simulate(configured(tiny, perturbation_interval=3), tmp_path, 1)


def test_a_failed_member_is_replaced_and_a_population_without_members_ends(tiny: Config, tmp_path: Path) -> None:
    config = configured(tiny, trials=2)
    pbt = simulate(config, tmp_path / "one", 0)
    for index, reason in ((0, "step 1: no number"), (1, None)):
        task = pbt.next_task()
        assert task is not None
        (tmp_path / "one" / task.name / "checkpoints" / "step-00000002").mkdir(parents=True)
        (tmp_path / "one" / task.name / "metrics.jsonl").touch()
        pbt.on_report(index, 2, {"loss": 1.0}, 1)
        pbt.on_end(index, reason)
    assert [(e.member, e.donor) for e in pbt.state.exploits] == [(0, 1)]
    none_left = simulate(config, tmp_path / "none", 0)
    for index in (0, 1):
        none_left.next_task()
        none_left.on_end(index, "step 1: no number")
    assert none_left.is_done
    assert [trial.state for trial in none_left.trials.values()] == ["failed", "failed"]

"""Every YAML file of conf/ composes."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import check, config_groups, declared
from engine.objectives.contract import objective_names
from jobs.entry import compose

JOBS = sorted(path.stem for path in (Path(__file__).parents[3] / "conf").glob("*.yaml"))


@pytest.mark.parametrize("job", JOBS)
def test_every_job_composes(job: str) -> None:
    check(compose(job, []))


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group, names in config_groups() if group != "experiment" for name in names]
)
def test_every_group_file_composes(choice: str) -> None:
    check(compose("pretrain", [choice]))


@pytest.mark.parametrize("name", dict(config_groups())["experiment"])
def test_every_experiment_and_its_stages_compose(name: str) -> None:
    config = compose("demo", [f"experiment={name}"])
    check(compose("pretrain", config.demo.pretrain))
    check(compose("sweep", config.demo.sweep))


def test_every_objective_has_a_file_and_is_listed_in_the_help() -> None:
    """The help of objective.name lists conf/objective, without importing the objectives."""
    assert dict(config_groups())["objective"] == objective_names()
    help = next(field.metadata["help"] for key, field, _ in declared() if key == "objective.name")
    assert help.endswith(": " + ", ".join(objective_names()))

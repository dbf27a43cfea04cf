"""A real sweep on Ray Tune; and a space that no trial could take is refused before any starts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.errors import UserError
from engine.sweep.launch import sweep, trial_share
from engine.sweep.space import check_space
from engine.train.run_folder import RunFolder

SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-2]}, "train.global_batch": {"choice": [8, 16]}}


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "sweep.space is empty"),
        ({"optim.lrr": {"uniform": [0.1, 0.2]}}, "optim.lrr is not an option; did you mean 'optim.lr'"),
        ({"optim.lr": {"normal": [0, 1]}}, "normal is not one of"),
        ({"optim.lr": {"loguniform": [0.1, 0.01]}}, "low first"),
        ({"optim.lr": {"uniform": [-1, 1]}}, "optim.lr=-1 is too small"),
        ({"optim.lr": 3}, "is no domain"),
        ({"train.precision": {"choice": ["bf16", "fp8"]}}, "train.precision=fp8 is not one of"),
    ],
)
def test_a_wrong_space_is_one_sentence(tiny: Config, space: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_space(with_values(tiny, {"sweep.space": space}))


def test_nested_keys_are_the_same_as_dotted_ones(tiny: Config) -> None:
    nested = with_values(
        tiny,
        {"sweep.space": {"optim": {"lr": {"loguniform": [1e-3, 1e-2]}}, "train.global_batch": {"choice": [8, 16]}}},
    )
    assert check_space(nested) == check_space(with_values(tiny, {"sweep.space": SPACE}))


def test_the_cores_are_shared_among_trials(tiny: Config) -> None:
    assert trial_share(tiny, {"CPU": 4.0}) == (4, {"CPU": 1.0})
    assert trial_share(with_values(tiny, {"sweep.concurrent": 2}), {"CPU": 4.0}) == (2, {"CPU": 2.0})
    assert trial_share(with_values(tiny, {"train.workers": 2}), {"CPU": 4.0}) == (2, {"CPU": 1.0})
    assert trial_share(with_values(tiny, {"train.cpus_per_worker": 2.0}), {"CPU": 4.0}) == (2, {"CPU": 2.0})


def test_a_sweep_stops_the_bad_and_keeps_the_best(ray: None, tiny_functions: Config) -> None:
    config = with_values(
        tiny_functions,
        {"name": "sweep", "sweep.space": SPACE, "sweep.trials": 4, "sweep.concurrent": 2, "sweep.grace_steps": 2,
         "train.max_steps": 6, "sweep.metric": "loss", "sweep.mode": "min", "job": "sweep", "tracking.enabled": True},
    )  # fmt: skip
    result = sweep(config)
    assert len(result.trials) == 4
    assert {trial.state for trial in result.trials} <= {"finished", "stopped early"}
    assert sum(len(trial.curve) for trial in result.trials) >= 4
    finished = [trial for trial in result.trials if trial.state == "finished"]
    assert result.best.value == min(trial.value for trial in finished if trial.value is not None)
    for trial in result.trials:
        assert 1e-3 <= trial.params["optim.lr"] <= 1e-2
        lines = list(RunFolder(config.run_dir / "trials" / trial.name).metrics())
        assert (trial.steps, trial.value) == (trial.curve[-1][0], lines[trial.steps - 1]["validation_loss"])
    bundle = Bundle.open(config.run_dir / "bundle")
    bundle.verify()
    assert bundle.manifest is not None
    assert bundle.manifest.run is not None
    assert bundle.manifest.run["name"] == result.best.name
    assert bundle.manifest.evaluation["validation_loss"] == result.best.value
    assert json.loads((config.run_dir / "sweep.json").read_text())["best"]["name"] == result.best.name
    assert not list((config.run_dir / "trials").glob("*/checkpoints"))
    assert sweep(config).best.value == result.best.value  # nothing is done twice

    from mlflow import MlflowClient

    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name("manta")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"sweep", *(trial.name for trial in result.trials)}
    best = runs[result.best.name]
    assert best.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert best.data.metrics["validation_loss"] == result.best.value
    assert float(best.data.params["optim.lr"]) == result.best.params["optim.lr"]


def test_a_trial_that_fails_fails_alone(ray: None, tiny_functions: Config) -> None:
    config = with_values(
        tiny_functions,
        {"name": "part", "sweep.space": {"optim.lr": {"grid": [1e-3, 1e30]}}, "sweep.trials": 1, "sweep.scheduler": "none",
         "optim.clip": 0.0, "train.max_steps": 6, "job": "sweep"},
    )  # fmt: skip
    result = sweep(config)
    states = {trial.params["optim.lr"]: trial for trial in result.trials}
    assert states[1e-3].state == "finished"
    assert states[1e30].state == "failed"
    assert "use a lower optim.lr" in states[1e30].reason
    assert result.best.params == {"optim.lr": 1e-3}


@pytest.mark.slow
def test_a_trial_may_have_several_workers(ray: None, tiny_functions: Config) -> None:
    config = with_values(
        tiny_functions,
        {"name": "wide", "sweep.space": {"optim.lr": {"grid": [1e-3, 3e-3]}}, "sweep.trials": 1, "sweep.scheduler": "none",
         "train.workers": 2, "zero.stage": 2, "train.max_steps": 4, "sweep.concurrent": 1, "job": "sweep"},
    )  # fmt: skip
    assert [trial.state for trial in sweep(config).trials] == ["finished", "finished"]

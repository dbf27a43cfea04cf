"""A sweep in MLflow: a parent run, and a child run for each trial with its params, curve and final state."""

from __future__ import annotations

import pytest

from engine.config import Config, with_values
from engine.sweep.launch import SweepResult, log_to_mlflow
from engine.sweep.trial_record import Trial
from tests.engine.bundles.test_alias import database, server, uri  # noqa: F401

TRIALS = [
    Trial(0, "tracked-000", {"optim.lr": 1e-3}, 6, 6, 0.5, state="finished", curve=[(3, 0.7), (6, 0.5)]),
    Trial(1, "tracked-001", {"optim.lr": 1e-2}, 6, 3, 0.9, state="stopped early", curve=[(3, 0.9)]),
    Trial(2, "tracked-002", {"optim.lr": 9.0}, 6, 0, None, state="failed", reason="step 1: no number"),
    Trial(3, "tracked-003", {"train.micro_batch": 99}, 6, 0, None, state="refused", reason="it does not fit"),
]


@pytest.mark.parametrize("uri", ["database", pytest.param("server", marks=pytest.mark.slow)], indirect=True)
def test_every_trial_is_a_child_run(uri: str, tiny: Config) -> None:  # noqa: F811
    from mlflow import MlflowClient

    config = with_values(tiny, {"name": "tracked", "job": "sweep", "tracking.enabled": True, "tracking.uri": uri})
    log_to_mlflow(config, SweepResult("loss", "min", TRIALS, TRIALS[0], 1.0, ["loss"]))
    client = MlflowClient(uri)
    runs = {
        run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("manta").experiment_id])
    }
    assert set(runs) == {"tracked", *(trial.name for trial in TRIALS)}
    parent = runs["tracked"]
    assert parent.data.metrics["validation_loss"] == 0.5
    for trial in TRIALS:
        child = runs[trial.name]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["manta.ended"] == trial.state + (f": {trial.reason}" if trial.reason else "")
        assert child.info.status == ("FAILED" if trial.state in ("failed", "refused") else "FINISHED")
        history = client.get_metric_history(child.info.run_id, "validation_loss") if trial.curve else []
        assert [(point.step, point.value) for point in history] == trial.curve
    assert float(runs["tracked-002"].data.params["optim.lr"]) == 9.0

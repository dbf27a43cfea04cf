"""Ranks of a trial: where it may be stopped, and how errors of other ranks are reported. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from engine.config import Config, with_values
from engine.sweep.rank_group import collect_errors, error_of, is_stop_point, raise_first
from engine.sweep.recovery import WorkerLost
from engine.train.job import TrainJob


def test_a_trial_may_be_stopped_after_a_validation_but_the_last(tiny: Config) -> None:
    job = TrainJob(with_values(tiny, {"train.max_steps": 6}), Path("data"))
    assert is_stop_point({"step": 3, "validation_loss": 1.0}, job)
    assert not is_stop_point({"step": 3, "loss": 1.0}, job)
    assert not is_stop_point({"step": 6, "validation_loss": 1.0}, job)


def test_errors_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ValueError("step 3: no number")

    def get(result: str) -> Any:
        if result == "lost":
            raise ray.exceptions.RayActorError
        if result == "failed":
            raise ray.exceptions.RayTaskError("train", "traceback", cause)

    monkeypatch.setattr(ray, "get", get)
    results: list[Any] = ["done", "lost", "failed"]
    assert error_of(results[0], 1) is None
    errors = collect_errors(results, results)
    assert [type(error) for error in errors] == [WorkerLost, ValueError]
    assert str(errors[0]) == "its worker 2 was lost"
    assert collect_errors(results, results[2:]) == [cause]


def test_the_first_error_is_raised() -> None:
    raise_first([])
    with pytest.raises(WorkerLost, match="first"):
        raise_first([WorkerLost("first"), ValueError("second")])

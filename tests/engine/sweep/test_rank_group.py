"""Ranks of a trial: where it may be stopped, and how errors of other ranks are reported."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, with_values
from engine.sweep.rank_group import collect_errors, error_of, is_stop_point, raise_first
from engine.sweep.recovery import WorkerLost
from engine.train.job import TrainJob


def test_a_trial_may_be_stopped_after_a_validation_but_the_last(tiny: Config) -> None:
    job = TrainJob(with_values(tiny, {"train.max_steps": 6}), Path("data"))
    assert is_stop_point({"step": 3, "validation_loss": 1.0}, job)
    assert not is_stop_point({"step": 3, "loss": 1.0}, job)
    assert not is_stop_point({"step": 6, "validation_loss": 1.0}, job)


def test_errors_of_ranks(ray: None) -> None:
    import ray as cluster

    class Rank:
        def fail(self) -> None:
            raise ValueError("step 3: no number")

        def wait(self) -> None:
            threading.Event().wait()

    actors: list[Any] = [cluster.remote(num_cpus=0)(Rank).remote() for _ in range(2)]
    lost, failed = actors[0].wait.remote(), actors[1].fail.remote()
    cluster.kill(actors[0])
    results = [cluster.put("done"), lost, failed]
    assert error_of(results[0], 1) is None
    errors = collect_errors(results, results)
    assert [type(error) for error in errors] == [WorkerLost, ValueError]
    assert [str(error) for error in errors] == ["its worker 2 was lost", "step 3: no number"]
    assert [str(error) for error in collect_errors(results, results[2:])] == ["step 3: no number"]
    cluster.kill(actors[1])


def test_the_first_error_is_raised() -> None:
    raise_first([])
    with pytest.raises(WorkerLost, match="first"):
        raise_first([WorkerLost("first"), ValueError("second")])

"""A process that trains trial after trial: one that is stopped leaves no thread, file or memory behind."""

from __future__ import annotations

import gc
import threading
from typing import Any

import psutil
import pytest

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.sweep.trial import lines_since, delete_checkpoints, metric_values
from engine.sweep.start_weights import start_state_factory, make_start_state
from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder
from engine.train.worker import single_process_group, train_worker
from engine.train.zero import ZeroModel


def test_a_stopped_trial_leaves_nothing(tiny: Config) -> None:
    config = with_values(tiny, {"train.evaluate_every": 1, "train.checkpoint_every": 1})
    job = TrainJob(config, prepare(config), exports_bundle=False)
    state, process, seen = make_start_state(job), psutil.Process(), []
    others = {id(thing) for thing in gc.get_objects() if isinstance(thing, ZeroModel)}  # that a test before has left

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise SystemExit  # as Tune ends a trial, while a checkpoint is being written

    for number in range(5):
        one = TrainJob(with_values(config, {"name": f"stopped-{number}"}), job.data_folder, exports_bundle=False)
        run = RunFolder(one.config.run_dir)
        run.logs.mkdir(parents=True)
        with pytest.raises(SystemExit):
            train_worker(one, single_process_group(), on_step=stop, model_factory=start_state_factory(state))
        assert [line["step"] for line in lines_since(run, 1)] == [2, 3]  # where it would go on
        delete_checkpoints(run)
        assert not run.checkpoints.exists()
        gc.collect()
        models = sum(isinstance(thing, ZeroModel) and id(thing) not in others for thing in gc.get_objects())
        seen.append((threading.active_count(), process.num_fds(), models, process.memory_info().rss))
    assert seen[-1][:2] == seen[1][:2]
    assert seen[-1][2] == seen[1][2] <= 1
    assert seen[-1][3] - seen[1][3] < 32 * 2**20


def test_a_metric_may_be_any_logged_figure() -> None:
    line = {"step": 3, "validation_loss": 2.0, "loss": 3.0, "seconds": 0.5}
    assert metric_values(line, ["loss", "seconds"]) == {"loss": 2.0, "seconds": 0.5}
    with pytest.raises(UserError, match=r"sweep\.metric=f1 is not measured here: use one of loss"):
        metric_values(line, ["f1"])

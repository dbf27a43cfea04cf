"""A process that trains several trials: a stopped trial leaves no thread, file or memory behind."""

from __future__ import annotations

import gc
import threading
from typing import Any

import psutil
import pytest

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.sweep.start_weights import make_start_state, start_state_factory
from engine.sweep.trial import delete_checkpoints, lines_since, metric_values
from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder
from engine.train.worker import single_process_group, train_worker
from engine.train.zero import ZeroModel


def test_a_stopped_trial_leaves_nothing_behind(tiny: Config) -> None:
    config = with_values(tiny, {"train.evaluate_every": 1, "train.checkpoint_every": 1})
    job = TrainJob(config, prepare(config), exports_bundle=False)
    state, process, usage = make_start_state(job), psutil.Process(), []
    others = {id(item) for item in gc.get_objects() if isinstance(item, ZeroModel)}  # left by earlier tests

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise SystemExit  # as Tune ends a trial, while a checkpoint is being written

    for number in range(5):
        trial = TrainJob(with_values(config, {"name": f"stopped-{number}"}), job.data_folder, exports_bundle=False)
        run = RunFolder(trial.config.run_dir)
        run.logs.mkdir(parents=True)
        with pytest.raises(SystemExit):
            train_worker(trial, single_process_group(), on_step=stop, model_factory=start_state_factory(state))
        assert [line["step"] for line in lines_since(run, 1)] == [2, 3]  # where it would resume
        delete_checkpoints(run)
        assert not run.checkpoints.exists()
        gc.collect()
        models = sum(isinstance(item, ZeroModel) and id(item) not in others for item in gc.get_objects())
        usage.append((threading.active_count(), process.num_fds(), models, process.memory_info().rss))
    assert usage[-1][:2] == usage[1][:2]
    assert usage[-1][2] == usage[1][2] <= 1
    assert usage[-1][3] - usage[1][3] < 32 * 2**20


def test_a_metric_may_be_any_logged_value() -> None:
    line = {"step": 3, "validation_loss": 2.0, "loss": 3.0, "seconds": 0.5}
    assert metric_values(line, ["loss", "seconds"]) == {"loss": 2.0, "seconds": 0.5}
    with pytest.raises(UserError, match=r"sweep\.metric=f1 is not measured here: use one of loss"):
        metric_values(line, ["f1"])

"""A trial that lost a worker is restarted up to a limit, with the same results; a trial that failed is not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import state
from engine.config import Config, to_dict, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.sweep.launch import SweepResult, read_result, sweep
from engine.sweep.recovery import Recovery, WorkerLost, clear_failure_reason, write_failure_reason
from engine.sweep.trial_record import Trial, TrialTask
from engine.train.run_folder import RunFolder
from tests.engine.train.test_elastic import ROOT, slow_nodes, wait

STEPS = 12


def test_a_lost_trial_is_restarted_up_to_the_limit(tmp_path: Path) -> None:
    recovery, trial, task = Recovery(2), Trial(0, "s-000", {}), TrialTask(0, "s-000", {}, 0, 6, "data")
    assert recovery.next_task() is None
    assert recovery.handle_error(trial, task, tmp_path) == (True, "its worker 0 was lost")
    write_failure_reason(tmp_path, WorkerLost("its worker 1 was lost"))
    assert recovery.handle_error(trial, task, tmp_path) == (True, "its worker 1 was lost")
    assert [recovery.next_task(), recovery.next_task(), recovery.next_task()] == [task, task, None]
    is_restarted, reason = recovery.handle_error(trial, task, tmp_path)
    assert not is_restarted
    assert reason == "its worker 1 was lost, after 2 restarts (train.max_failures)"
    assert recovery.next_task() is None
    assert Recovery(-1).handle_error(trial, task, tmp_path)[0]
    assert not Recovery(0).handle_error(Trial(1, "s-001", {}), task, tmp_path)[0]


def test_a_failed_trial_is_not_restarted(tmp_path: Path) -> None:
    recovery, trial, task = Recovery(2), Trial(0, "s-000", {}), TrialTask(0, "s-000", {}, 0, 6, "data")
    write_failure_reason(tmp_path, WorkerLost("its worker 1 was lost"))
    write_failure_reason(tmp_path, UserError("step 3: no number"))
    assert recovery.handle_error(trial, task, tmp_path) == (False, "step 3: no number")
    clear_failure_reason(tmp_path)
    assert list(tmp_path.iterdir()) == []


def of(config: Config, name: str, **values: Any) -> Config:
    """Configure a sweep with identical trials of two workers each."""
    options = {"name": name, "job": "sweep", "sweep.space": {"optim.lr": {"choice": [3e-3]}}, "sweep.scheduler": "none",
             "train.workers": 2, "zero.stage": 2, "train.max_steps": STEPS, "train.checkpoint_every": 2,
             "train.evaluate_every": 3, "sweep.metric": "loss", "sweep.mode": "min"}  # fmt: skip
    return with_values(config, options | {key.replace("__", "."): value for key, value in values.items()})


def process_of(trial: RunFolder, rank: int) -> int:
    """Return the process id of a trial's rank, from its heartbeat file."""
    return int(trial.heartbeat(rank).read_text().split()[0])


@contextlib.contextmanager
def kill_ranks(config: Config, targets: dict[str, tuple[int, int]], times: int = 1) -> Iterator[list[int]]:
    """Kill ranks: `targets` maps a trial's name to (rank, steps before the kill); `times` per trial. Yield the killed pids."""
    done, killed = threading.Event(), list[int]()

    def watch() -> None:
        remaining = dict.fromkeys(targets, times)
        while any(remaining.values()) and not done.is_set():
            for name, (rank, after) in targets.items():
                trial = RunFolder(config.run_dir / "trials" / name)
                with contextlib.suppress(OSError, IndexError, ValueError, psutil.NoSuchProcess):
                    steps = trial.metrics_file.read_bytes().count(b"\n")
                    process = psutil.Process(process_of(trial, rank))
                    if remaining[name] and steps >= after and process.pid not in killed and process.pid != os.getpid():
                        process.send_signal(signal.SIGKILL)
                        killed.append(process.pid)
                        remaining[name] -= 1
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def curves(config: Config, result: SweepResult) -> list[list[dict[str, Any]]]:
    """Return each trial's logged metrics that do not depend on time."""
    keys = ("step", "loss", "tokens", "samples_hash", "grad_norm", "validation_loss")
    folders = [RunFolder(config.run_dir / "trials" / trial.name) for trial in result.trials]
    return [[{k: line[k] for k in keys if k in line} for line in folder.metrics()] for folder in folders]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_trial_resumes_after_one_of_its_workers_was_killed(
    ray: None, tiny_functions: Config, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    config = of(tiny_functions, f"shot{rank}", sweep__trials=2, sweep__max_concurrent_trials=1)
    name = f"shot{rank}-000"
    with kill_ranks(config, {name: (rank, 4)}) as killed:
        result = sweep(config)
    assert len(killed) == 1
    assert [(trial.state, trial.losses) for trial in result.trials] == [("finished", 1), ("finished", 0)]
    shot, undisturbed = curves(config, result)
    assert [line["step"] for line in undisturbed] == list(range(1, STEPS + 1))
    assert shot == undisturbed  # bit for bit
    assert result.trials[0].curve == result.trials[1].curve
    assert f"trial {name} is restarted: its worker {rank} was lost (restart 1)" in capsys.readouterr().out
    assert f"worker {rank} was lost" in RunFolder(config.run_dir / "trials" / name).events.read_text()


@pytest.mark.slow
def test_a_trial_that_is_lost_too_often_fails_and_others_are_unaffected(ray: None, tiny_functions: Config) -> None:
    config = of(tiny_functions, "doomed", sweep__trials=2, sweep__max_concurrent_trials=2, train__max_failures=1)
    with kill_ranks(config, {"doomed-000": (1, 0)}, times=2):
        result = sweep(config)
    assert [trial.state for trial in result.trials] == ["failed", "finished"]
    assert result.trials[0].reason == "its worker 1 was lost, after 1 restarts (train.max_failures)"
    assert result.trials[1].losses == 0
    assert len(curves(config, result)[1]) == STEPS
    assert json.loads((config.run_dir / "sweep.json").read_text())["best"]["name"] == "doomed-001"


DRIVER = """
import sys, yaml
from cluster.environment import set_default_environment
set_default_environment()
from engine.config import from_dict
from jobs.sweep import sweep
sweep(from_dict(yaml.safe_load(open(sys.argv[1]))))
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[state.ClusterState]:
    with slow_nodes(tmp_path, 3) as nodes:
        yield nodes


@pytest.mark.slow
def test_a_trial_whose_node_is_lost_is_restarted_on_the_remaining_nodes(
    tiny_functions: Config, nodes: state.ClusterState, tmp_path: Path
) -> None:
    prepare(tiny_functions)
    config = of(tiny_functions, "moved", sweep__trials=2, train__cpus_per_worker=1.0, train__max_steps=20,
                cluster__address="auto")  # fmt: skip
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(to_dict(config)))
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": nodes.token_path}
    with (tmp_path / "output.txt").open("wb") as output, subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "moved.yaml")], cwd=ROOT, env=environment, stdout=output, stderr=output
    ) as process:  # fmt: skip
        try:
            trial = RunFolder(config.run_dir / "trials" / "moved-000")
            wait(lambda: trial.metrics_file.exists() and trial.metrics_file.read_bytes().count(b"\n") >= 4, process)
            raylets = [kin for rank in (0, 1) for kin in psutil.Process(process_of(trial, rank)).parents() if kin.name() == "raylet"]  # fmt: skip
            lost = next(raylet for raylet in raylets if "--head" not in raylet.cmdline())
            for kin in (lost, *lost.children(recursive=True)):
                kin.kill()
            assert process.wait(300) == 0, (tmp_path / "output.txt").read_text()
        finally:
            process.terminate()
    result = read_result(config.run_dir / "sweep.json")
    assert [(trial.state, trial.losses) for trial in result.trials] == [("finished", 1), ("finished", 0)]
    moved, undisturbed = curves(config, result)
    assert [line["step"] for line in undisturbed] == list(range(1, 21))
    assert moved == undisturbed

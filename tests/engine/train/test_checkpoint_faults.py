"""Failures while a checkpoint is written: there is always a valid one, and a full disk does not end the run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.run_folder import MetricsLog, RunFolder
from tests.engine.train.ranks import losses, on_ranks, run_ranks, train_jobs

# For each line of checkpoint.py that a save executes: saves a second checkpoint of two ranks in a fork that is killed
# before that line, and prints which checkpoint is then the latest valid one, and its weight.
KILLED_AT_EACH_LINE = """
import json, os, shutil, signal, sys, threading
from pathlib import Path
import torch
from engine.train import checkpoint
from engine.train.checkpoint import CheckpointWriter, latest_valid
from engine.train.process_group import ProcessGroup
from engine.train.run_folder import MetricsLog, RunFolder
from engine.train.train_state import TrainState
from engine.train.zero import Fragment

def save(run, step):
    writers = [CheckpointWriter(run.checkpoints, rank, 2, keep=1, wait_s=20) for rank in range(2)]
    for rank, writer in enumerate(writers):
        weight = torch.full((1000,), float(step))
        writer.save([Fragment("a", (2000,), 1000 * rank, {"weight": weight})], TrainState(step=step), {})
    for writer in writers:
        writer.wait()

def kill_at(line):
    left = [line]
    def trace(frame, event, arg):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

root, line = Path(sys.argv[1]), 0
before = RunFolder(root / "before")
before.logs.mkdir(parents=True)
save(before, 1)
while True:
    line += 1
    run = RunFolder(root / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(before.path, run.path)
    child = os.fork()
    if child == 0:
        threading.settrace(kill_at(line))  # of the writer threads
        save(run, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    latest = latest_valid(run, ProcessGroup(0, 1, torch.device("cpu")))
    weight = latest.weights()["a"]
    left = sorted(path.name for path in run.checkpoints.iterdir())
    print("FOUND", json.dumps([os.WIFSIGNALED(status), latest.state.step, weight.unique().tolist(), left]))
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_kill_at_any_line_of_a_save_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_LINE, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(outcomes) > 60  # executed lines of a save
    steps = [step for _, step, _, _ in outcomes]
    assert set(steps) == {1, 2}
    assert [killed for killed, _, _, _ in outcomes] == [True] * (len(outcomes) - 1) + [False]
    for _, step, weights, left in outcomes:
        assert weights == [float(step)]
        assert left in (["step-00000001"], ["step-00000001", "step-00000002"], ["step-00000002"])
    assert "is an incomplete checkpoint: it is removed" in done.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


FULL, FREE = 4, 7  # data steps before which the disk is filled, and emptied


def train_on_a_full_disk(rank: int, world_size: int, specs: str, filler: str) -> None:
    """Run jobs while another file fills the checkpoints' disk for some steps."""
    from engine.train import loop

    original = loop.train_step

    def train_step(run: Any) -> Any:
        run.writer.wait()  # so that it is known which save fails
        run.group.barrier()
        if run.state.data_step == FULL and rank == 0:
            with open(filler, "wb") as file:
                file.write(bytes(shutil.disk_usage(Path(filler).parent).free - 100_000))
        if run.state.data_step == FREE:
            Path(filler).unlink(missing_ok=True)
        run.group.barrier()
        return original(run)

    loop.train_step = train_step
    for spec in json.loads(specs):
        try:
            train_jobs(rank, world_size, json.dumps([spec]))
        except UserError as error:
            (RunFolder(TrainJob.from_dict(spec).config.run_dir).logs / f"failed-{rank}.txt").write_text(str(error))


def test_training_continues_or_stops_at_a_full_disk_and_the_last_checkpoint_is_valid(
    tiny: Config, small_disk: Path
) -> None:
    data = prepare(tiny)
    layout = {"train.workers": 2, "zero.stage": 2, "train.max_steps": 12, "train.checkpoint_every": 3}
    jobs = {}
    for name, choice in (("disk-continues", "go_on"), ("disk-stops", "stop"), ("disk-free", "go_on")):
        job = TrainJob(with_values(tiny, layout | {"name": name, "train.on_failed_save": choice}), data)
        job.config.run_dir.mkdir(parents=True)
        jobs[name] = job
        if name != "disk-free":
            (small_disk / name).mkdir()
            RunFolder(job.config.run_dir).checkpoints.symlink_to(small_disk / name)
    affected = [jobs["disk-continues"], jobs["disk-stops"]]
    on_ranks(train_on_a_full_disk, 2, json.dumps([job.to_dict() for job in affected]), str(small_disk / "filler"))
    (unaffected,) = run_ranks([jobs["disk-free"]], 2)

    run = RunFolder(jobs["disk-continues"].config.run_dir)
    lines = list(run.metrics())
    assert losses(lines) == losses(unaffected)
    faults = {line["step"]: line["save_fault"] for line in lines if "save_fault" in line}
    assert list(faults) == [7]
    assert "No space left on device" in faults[7]
    assert [folder.name for folder in step_folders(run.checkpoints)] == ["step-00000012", "step-00000009"]
    assert (run.bundle / "manta.json").exists()

    run = RunFolder(jobs["disk-stops"].config.run_dir)
    assert len(list(run.metrics())) == 6
    for rank in (0, 1):
        fault = (run.logs / f"failed-{rank}.txt").read_text()
        assert "could not be written" in fault
        assert "No space left on device" in fault
    (left,) = step_folders(run.checkpoints)
    assert left.name == "step-00000003"
    Checkpoint(left).verify()
    assert os.listdir(run.checkpoints) == ["step-00000003"]  # the failed one's disk space is free again


def test_metric_lines_wait_for_disk_space(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log = MetricsLog(run, 0)
    log({"step": 1, "loss": 1.0})
    limit_bytes = run.metrics_file.stat().st_size + 10  # enough for a part of a line
    before, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        log({"step": 2, "loss": 2.0})
        assert [line["step"] for line in run.metrics()] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    log({"step": 3, "loss": 3.0})
    assert [line["loss"] for line in run.metrics()] == [1.0, 2.0, 3.0]
    log({"step": 2, "loss": 2.5})  # repeated after a rollback
    log.close()
    assert [line["loss"] for line in run.metrics()] == [1.0, 2.5]

"""Whatever happens while a checkpoint is written, there is a whole one; and a full disk is not the end."""

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
from tests.engine.train.ranks import losses, on_ranks, run_ranks, work_on

# Saves a checkpoint of two ranks over one that is there, in a fork for each line of checkpoint.py that the save runs
# through, which is killed before that line; tells which checkpoint is then the latest whole one, and its weight.
KILLED_AT_EACH_LINE = """
import json, os, shutil, signal, sys, threading
from pathlib import Path
import torch
from engine.train import checkpoint
from engine.train.checkpoint import CheckpointWriter, latest_whole
from engine.train.process_group import Group
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

def killing(at):
    left = [at]
    def trace(frame, event, arg):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

root, at = Path(sys.argv[1]), 0
before = RunFolder(root / "before")
before.logs.mkdir(parents=True)
save(before, 1)
while True:
    at += 1
    run = RunFolder(root / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(before.path, run.path)
    child = os.fork()
    if child == 0:
        threading.settrace(killing(at))  # of the threads that write
        save(run, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    latest = latest_whole(run, Group(0, 1, torch.device("cpu")))
    weight = latest.weights()["a"]
    left = sorted(path.name for path in run.checkpoints.iterdir())
    print("FOUND", json.dumps([os.WIFSIGNALED(status), latest.state.step, weight.unique().tolist(), left]))
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_kill_at_any_line_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_LINE, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) > 60  # lines of a save
    steps = [step for _, step, _, _ in found]
    assert set(steps) == {1, 2}
    assert [killed for killed, _, _, _ in found] == [True] * (len(found) - 1) + [False]
    for _, step, weights, left in found:
        assert weights == [float(step)]
        assert left in (["step-00000001"], ["step-00000001", "step-00000002"], ["step-00000002"])
    assert "is an incomplete checkpoint: it is removed" in done.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


FULL, FREE = 4, 7  # before the step at this place of the data order the disk is filled, and emptied


def on_a_full_disk(rank: int, world: int, specs: str, filler: str) -> None:
    """Run jobs while other files take all room on the checkpoints' disk for a while."""
    from engine.train import loop

    sound = loop.train_step

    def train_step(run: Any) -> Any:
        run.writer.wait()  # so that it is known which save meets the full disk
        run.group.barrier()
        if run.state.place == FULL and rank == 0:
            with open(filler, "wb") as file:
                file.write(bytes(shutil.disk_usage(Path(filler).parent).free - 100_000))
        if run.state.place == FREE:
            Path(filler).unlink(missing_ok=True)
        run.group.barrier()
        return sound(run)

    loop.train_step = train_step
    for spec in json.loads(specs):
        try:
            work_on(rank, world, json.dumps([spec]))
        except UserError as error:
            (RunFolder(TrainJob.from_dict(spec).config.run_dir).logs / f"failed-{rank}.txt").write_text(str(error))


def test_training_goes_on_or_stops_at_a_full_disk_and_the_last_checkpoint_is_whole(
    tiny: Config, small_disk: Path
) -> None:
    data = prepare(tiny)
    layout = {"train.workers": 2, "zero.stage": 2, "train.max_steps": 12, "train.checkpoint_every": 3}
    jobs = {}
    for name, choice in (("disk-goes-on", "go_on"), ("disk-stops", "stop"), ("disk-free", "go_on")):
        job = TrainJob(with_values(tiny, layout | {"name": name, "train.on_failed_save": choice}), data)
        job.config.run_dir.mkdir(parents=True)
        jobs[name] = job
        if name != "disk-free":
            (small_disk / name).mkdir()
            RunFolder(job.config.run_dir).checkpoints.symlink_to(small_disk / name)
    harmed = [jobs["disk-goes-on"], jobs["disk-stops"]]
    on_ranks(on_a_full_disk, 2, json.dumps([job.to_dict() for job in harmed]), str(small_disk / "filler"))
    (undisturbed,) = run_ranks([jobs["disk-free"]], 2)

    run = RunFolder(jobs["disk-goes-on"].config.run_dir)
    lines = list(run.metrics())
    assert losses(lines) == losses(undisturbed)
    told = {line["step"]: line["save_fault"] for line in lines if "save_fault" in line}
    assert list(told) == [7]
    assert "No space left on device" in told[7]
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
    assert os.listdir(run.checkpoints) == ["step-00000003"]  # the room of the failed one is free again


def test_the_lines_of_a_log_wait_for_room(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log = MetricsLog(run, 0)
    log({"step": 1, "loss": 1.0})
    room = run.metrics_file.stat().st_size + 10  # for a part of a line
    before, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        log({"step": 2, "loss": 2.0})
        assert [line["step"] for line in run.metrics()] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    log({"step": 3, "loss": 3.0})
    assert [line["loss"] for line in run.metrics()] == [1.0, 2.0, 3.0]
    log({"step": 2, "loss": 2.5})  # taken again after a roll-back
    log.close()
    assert [line["loss"] for line in run.metrics()] == [1.0, 2.5]

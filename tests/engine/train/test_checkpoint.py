"""Checkpoints: fragments are read back at any sharding, and an invalid checkpoint is never used."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train.checkpoint import BrokenCheckpoint, Checkpoint, CheckpointWriter, step_folder, step_folders
from engine.train.job import TrainJob
from engine.train.process_group import ProcessGroup
from engine.train.run_folder import RunFolder
from engine.train.train_state import TrainState
from engine.train.worker import single_process_group, train_worker
from engine.train.zero import Fragment

FULL = {"a.weight": torch.arange(12.0).view(3, 4), "b:odd.name": torch.arange(7.0)}


def fragments(rank: int, world_size: int) -> Iterator[Fragment]:
    for name, full in FULL.items():
        size = -(-full.numel() // world_size)
        flat = full.flatten()[rank * size : (rank + 1) * size].clone()
        if flat.numel():
            yield Fragment(name, tuple(full.shape), rank * size, {"weight": flat, "exp_avg": flat * 2})


def write(folder: Path, step: int, world_size: int = 2, keep: int = 2) -> Path:
    writers = [CheckpointWriter(folder, rank, world_size, keep) for rank in range(world_size)]
    for rank, writer in enumerate(writers):
        writer.save(fragments(rank, world_size), TrainState(step=step, samples=8 * step), {"config": "c"})
    for writer in writers:
        writer.wait()
        assert not writer.has_failed
    return step_folder(folder, step)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_fragments_are_read_back_at_any_sharding(tmp_path: Path, world_size: int) -> None:
    checkpoint = Checkpoint(write(tmp_path, 3, world_size))
    checkpoint.verify()
    assert checkpoint.state == TrainState(step=3, samples=24)
    for name, weight in checkpoint.weights().items():
        assert torch.equal(weight, FULL[name])
    target = torch.empty(5)
    checkpoint.copy_into("exp_avg", "a.weight", 4, target)
    assert target.tolist() == [8.0, 10.0, 12.0, 14.0, 16.0]


def test_a_save_has_the_values_of_its_step_even_if_the_copy_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, copy = torch.arange(1000.0), CheckpointWriter._copy

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return copy(*args)

    monkeypatch.setattr(CheckpointWriter, "_copy", slow)
    writer = CheckpointWriter(tmp_path, 0, 1, 2)
    writer.save([Fragment("a", (1000,), 0, {"weight": weight})], TrainState(step=1), {})
    writer.wait_for_copy()
    weight.zero_()
    writer.wait()
    assert torch.equal(Checkpoint(step_folder(tmp_path, 1)).weights()["a"], torch.arange(1000.0))


def test_only_the_latest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert step_folders(tmp_path) == [step_folder(tmp_path, 4), step_folder(tmp_path, 3)]
    assert len(list(tmp_path.iterdir())) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = [
    (flip, "was changed"),
    (lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes, not"),
    (lambda path: path.unlink(), "is missing"),
    (lambda path: (path.parent / "manifest.json").write_text(""), "cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_reported_with_the_file(tmp_path: Path, damage: object, message: str) -> None:
    folder = write(tmp_path, 1)
    file = sorted(folder.glob("*.safetensors"))[1]
    damage(file)  # type: ignore[operator]
    with pytest.raises(BrokenCheckpoint, match=message) as caught:
        Checkpoint(folder).verify()
    assert ("manifest.json" if message == "cannot be read" else file.name) in str(caught.value)


def test_the_previous_checkpoint_is_used_and_never_a_silent_restart_from_scratch(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    data, group = prepare(tiny), single_process_group()
    values = {"schedule.total_steps": 15, "train.checkpoint_every": 3, "zero.stage": 1, "optim.lr": 2e-3}
    damaged, straight = (
        with_values(tiny, values | {"name": name, "train.max_steps": 15}) for name in ("damaged", "undamaged")
    )
    run = RunFolder(damaged.run_dir)
    for config in (damaged, straight):
        RunFolder(config.run_dir).logs.mkdir(parents=True)
    train_worker(TrainJob(straight, data), group)
    train_worker(TrainJob(with_values(damaged, {"train.max_steps": 6}), data), group)
    for max_steps, (damage, message) in zip((9, 12, 15, 15), DAMAGES, strict=True):
        latest = step_folders(run.checkpoints)[0]
        damage(next(latest.glob("*.safetensors")))
        train_worker(TrainJob(with_values(damaged, {"train.max_steps": max_steps}), data), group)
        assert message in capsys.readouterr().out
        assert message in run.events.read_text()
        assert (run.checkpoints / f"broken-{latest.name}").exists()
    for name in ("step", "loss", "samples_hash"):
        assert [line[name] for line in run.metrics()] == [
            line[name] for line in RunFolder(straight.run_dir).metrics()
        ], name
    for folder in step_folders(run.checkpoints):
        flip(next(folder.glob("*.safetensors")))
    with pytest.raises(UserError, match=r"no checkpoint of .* is valid"):
        train_worker(TrainJob(damaged, data), group)


def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    code = (
        "import sys, torch; from pathlib import Path; from engine.train.checkpoint import CheckpointWriter;"
        "from engine.train.train_state import TrainState; from engine.train.zero import Fragment;"
        "big = torch.zeros(50_000_000); w = CheckpointWriter(Path(sys.argv[1]), 0, 2, 2);"
        "w.save([Fragment('a', (50_000_000,), 0, {'weight': big})], TrainState(step=2), {}); print('saving', flush=True); w.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert step_folders(tmp_path) == [step_folder(tmp_path, 1)]
    Checkpoint(step_folder(tmp_path, 1)).verify()


def test_a_full_disk_is_reported_and_the_previous_checkpoint_stays_valid(tmp_path: Path) -> None:
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(tmp_path, 0, 1, 2)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        writer.save([Fragment("a", (100_000,), 0, {"weight": torch.zeros(100_000)})], TrainState(step=2), {})
        writer.wait()
        assert writer.has_failed
        fault = writer.clear_failure(ProcessGroup(0, 1, torch.device("cpu")))
        assert re.search(r"could not be written.*File too large.*the previous one is valid", fault)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert step_folders(tmp_path) == [step_folder(tmp_path, 1)]
    Checkpoint(step_folder(tmp_path, 1)).verify()

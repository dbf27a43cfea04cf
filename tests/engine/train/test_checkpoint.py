"""Pieces in, pieces out, at any split; and nothing torn is ever used."""

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
from engine.train.process_group import ProcessGroup
from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder
from engine.train.train_state import TrainState
from engine.train.worker import single_process_group, train_worker
from engine.train.zero import Fragment

FULL = {"a.weight": torch.arange(12.0).view(3, 4), "b:odd.name": torch.arange(7.0)}


def pieces(rank: int, world: int) -> Iterator[Fragment]:
    for name, full in FULL.items():
        part = -(-full.numel() // world)
        flat = full.flatten()[rank * part : (rank + 1) * part].clone()
        if flat.numel():
            yield Fragment(name, tuple(full.shape), rank * part, {"weight": flat, "exp_avg": flat * 2})


def write(folder: Path, step: int, world: int = 2, keep: int = 2) -> Path:
    writers = [CheckpointWriter(folder, rank, world, keep) for rank in range(world)]
    for rank, writer in enumerate(writers):
        writer.save(pieces(rank, world), TrainState(step=step, samples=8 * step), {"config": "c"})
    for writer in writers:
        writer.wait()
        assert not writer.has_failed
    return step_folder(folder, step)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_pieces_come_back_at_any_split(tmp_path: Path, world: int) -> None:
    checkpoint = Checkpoint(write(tmp_path, 3, world))
    checkpoint.verify()
    assert checkpoint.state == TrainState(step=3, samples=24)
    for name, weight in checkpoint.weights().items():
        assert torch.equal(weight, FULL[name])
    into = torch.empty(5)
    checkpoint.copy_into("exp_avg", "a.weight", 4, into)
    assert into.tolist() == [8.0, 10.0, 12.0, 14.0, 16.0]


def test_a_save_holds_the_moment_however_slow_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert step_folders(tmp_path) == [step_folder(tmp_path, 4), step_folder(tmp_path, 3)]
    assert len(list(tmp_path.iterdir())) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


HARM = [
    (flip, "was changed"),
    (lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes, not"),
    (lambda path: path.unlink(), "is missing"),
    (lambda path: (path.parent / "manifest.json").write_text(""), "cannot be read"),
]


@pytest.mark.parametrize(("harm", "said"), HARM)
def test_harm_is_named(tmp_path: Path, harm: object, said: str) -> None:
    folder = write(tmp_path, 1)
    file = sorted(folder.glob("*.safetensors"))[1]
    harm(file)  # type: ignore[operator]
    with pytest.raises(BrokenCheckpoint, match=said) as caught:
        Checkpoint(folder).verify()
    assert (file.name if "manifest" not in str(caught.value) else "manifest.json") in str(caught.value)


def test_the_one_before_is_used_and_never_a_silent_fresh_start(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    data, group = prepare(tiny), single_process_group()
    values = {"schedule.total_steps": 15, "train.checkpoint_every": 3, "zero.stage": 1, "optim.lr": 2e-3}
    harmed, straight = (
        with_values(tiny, values | {"name": name, "train.max_steps": 15}) for name in ("harmed", "unharmed")
    )
    run = RunFolder(harmed.run_dir)
    for config in (harmed, straight):
        RunFolder(config.run_dir).logs.mkdir(parents=True)
    train_worker(TrainJob(straight, data), group)
    train_worker(TrainJob(with_values(harmed, {"train.max_steps": 6}), data), group)
    for until, (harm, said) in zip((9, 12, 15, 15), HARM, strict=True):
        latest = step_folders(run.checkpoints)[0]
        harm(next(latest.glob("*.safetensors")))
        train_worker(TrainJob(with_values(harmed, {"train.max_steps": until}), data), group)
        assert said in capsys.readouterr().out
        assert said in run.events.read_text()
        assert (run.checkpoints / f"broken-{latest.name}").exists()
    for name in ("step", "loss", "samples_hash"):
        assert [line[name] for line in run.metrics()] == [
            line[name] for line in RunFolder(straight.run_dir).metrics()
        ], name
    for found in step_folders(run.checkpoints):
        flip(next(found.glob("*.safetensors")))
    with pytest.raises(UserError, match=r"no checkpoint of .* is valid"):
        train_worker(TrainJob(harmed, data), group)


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
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


def test_a_full_disk_is_told_and_the_one_before_stays_whole(tmp_path: Path) -> None:
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

"""Training with Ray Train workers: the same curve as without Ray, also if workers are killed or stopped."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from engine.config import Config, with_values
from engine.data.order import DataOrder, add_hashes, hash_hex, ids_hash
from engine.data.packing import Blocks
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.errors import UserError
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.job import TrainJob
from engine.train.launch import train, worker_resources
from engine.train.run_folder import RunFolder
from engine.train.worker import single_process_group, train_worker
from tests.engine.train.ranks import run_ranks
from tests.ports import listened

LONG = {  # a learning rate at which rounding differences between layouts stay below 1e-5
    "train.max_steps": 60, "train.checkpoint_every": 5, "optim.lr": 2e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny: Config) -> list[dict[str, object]]:
    """Return the lines of the run in this process, on one rank."""
    config = with_values(tiny, {"name": "alone", "zero.stage": 0, **LONG})
    run = RunFolder(config.run_dir)
    run.logs.mkdir(parents=True)
    train_worker(TrainJob(config, prepare(tiny)), single_process_group())
    return list(run.metrics())


@pytest.fixture(scope="module")
def two(tiny: Config) -> list[dict[str, object]]:
    """Return the lines of the uninterrupted run on two ranks, without Ray."""
    config = with_values(tiny, {"name": "two", "train.workers": 2, "zero.stage": 2, **LONG})
    (lines,) = run_ranks([TrainJob(config, prepare(tiny))], 2)
    return lines


def worker_processes() -> list[psutil.Process]:
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                workers.append(process)
    return workers


class SignalSender(threading.Thread):
    """Sends signals to workers of a run, each when the run has reached a step."""

    def __init__(self, run: RunFolder, signals: list[tuple[int, signal.Signals]]) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.signals, self.killed_pids = run, signals, [0]
        self.listened: set[str] = set()  # addresses that the workers listened on

    def run(self) -> None:
        for step, number in self.signals:
            deadline = time.monotonic() + 120
            worker: psutil.Process | None = None
            while time.monotonic() < deadline:
                if worker is None or not worker.is_running():  # listing processes takes long compared to a step
                    worker = next((p for p in worker_processes()[::-1] if p.pid not in self.killed_pids), None)
                elif (
                    self.run_folder.metrics_file.exists()
                    and self.run_folder.metrics_file.read_bytes().count(b"\n") >= step
                ):
                    self.listened |= listened(worker_processes())
                    self.killed_pids.append(worker.pid)
                    worker.send_signal(number)
                    break
                time.sleep(0.01)


def train_with_signals(config: Config, signals: list[tuple[int, signal.Signals]]) -> SignalSender:
    sender = SignalSender(RunFolder(config.run_dir), signals)
    sender.start()
    result = train(config)
    sender.join()
    assert len(sender.killed_pids) == len(signals) + 1, "the run ended before all signals were sent"
    assert result.last_metrics["step"] == config.train.max_steps
    return sender


def assert_same_as_uninterrupted(config: Config, lines: list[dict[str, object]]) -> None:
    """Assert that a run's curve and weights are bit for bit those of the uninterrupted run on two ranks."""
    own = list(RunFolder(config.run_dir).metrics())
    for name in ("step", "loss", "grad_norm", "samples_hash", "tokens"):
        assert [line[name] for line in own] == [line[name] for line in lines], name
    actual, expected = (
        Checkpoint(step_folders(folder / "checkpoints")[0])
        for folder in (config.run_dir, config.run_dir.parent / "two")
    )
    assert actual.state == expected.state
    for name, weight in actual.weights().items():
        assert torch.equal(weight, expected.weights()[name]), name


def two_workers(tiny: Config, name: str, **changes: object) -> Config:
    layout = {"name": name, "train.workers": 2, "zero.stage": 2, "train.cpus_per_worker": 1.0}
    return with_values(tiny, layout | LONG | {f"train.{key}": value for key, value in changes.items()})


def test_killed_and_stopped_workers_do_not_change_the_result(
    ray: None, tiny: Config, alone: list[dict[str, float]], two: list[dict[str, object]]
) -> None:
    config = two_workers(tiny, "killed", max_failures=4, hang_timeout_s=5.0)
    sender = train_with_signals(config, [(11, signal.SIGKILL), (25, signal.SIGSTOP)])
    assert_same_as_uninterrupted(config, two)
    assert sender.listened == {"127.0.0.1"}
    run = RunFolder(config.run_dir)
    lines = list(run.metrics())
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], abs=1e-5)
    status = run.status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 60)
    assert (run.bundle / "manta.json").exists()
    assert "worker-0.log" in {path.name for path in run.logs.iterdir()}
    # Events are logged, with the stacks of the stopped rank and of the one that waited for it.
    events = run.events.read_text()
    assert re.search(r"worker .* was lost", events)
    assert re.search(r"worker .* made no progress for 5 s \(worker [01] is stopped\)", events)
    for rank in (0, 1):
        assert "train_step" in run.stacks(rank).read_text(), rank
    assert not psutil.pid_exists(sender.killed_pids[-1])
    # The same command again has nothing to do.
    assert train(config).last_metrics["loss"] == lines[-1]["loss"]
    assert run.status() == status  # which has the time of the last write


@pytest.mark.slow
def test_five_kills_at_random_steps_do_not_change_the_result(
    ray: None, tiny: Config, two: list[dict[str, object]]
) -> None:
    config = two_workers(tiny, "killed-often", max_failures=5)
    steps = sorted(random.Random(1).sample(range(3, 56), 5))
    train_with_signals(config, [(step, signal.SIGKILL) for step in steps])
    assert_same_as_uninterrupted(config, two)
    blocks = Blocks(Split.open(prepare(tiny), "train"), 32)
    order = DataOrder(len(blocks), 8, tiny.seed)
    expected = hash_hex(add_hashes(ids_hash(order.sample_ids(step)) for step in range(60)))
    assert list(RunFolder(config.run_dir).metrics())[-1]["samples_hash"] == expected


def test_too_many_failures_end_the_run_with_the_reason(ray: None, tiny: Config) -> None:
    config = two_workers(tiny, "hung", max_failures=0, hang_timeout_s=4.0)
    sender = SignalSender(RunFolder(config.run_dir), [(5, signal.SIGSTOP)])
    sender.start()
    with pytest.raises(UserError, match=r"made no progress for 4 s .*is stopped.*: see .*worker-0.log"):
        train(config)
    sender.join()


def test_a_finished_run_continues_with_more_steps(ray: None, tiny: Config, alone: list[dict[str, float]]) -> None:
    config = with_values(
        tiny,
        {
            "name": "more",
            "train.cpus_per_worker": 1.0,
            "zero.stage": 3,
            "schedule.total_steps": 60,
            "optim.lr": LONG["optim.lr"],
            "train.max_steps": 5,
        },
    )
    train(config)
    train(with_values(config, {"train.max_steps": 10}))
    lines = list(RunFolder(config.run_dir).metrics())
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone[:10]], abs=1e-5)
    latest = Checkpoint(step_folders(config.run_dir / "checkpoints")[0])
    assert latest.state.step == 10


def test_a_nan_loss_ends_the_run_with_a_reason_and_no_restart(ray: None, tiny: Config) -> None:
    config = with_values(
        tiny, {"name": "nan", "train.cpus_per_worker": 1.0, "optim.lr": 1e30, "optim.clip": 0.0, "zero.stage": 0}
    )
    with pytest.raises(
        UserError, match=r"step 5: .*, after 3 in a row were skipped, and there is no good checkpoint .* than 1e\+30"
    ):
        train(config)
    status = RunFolder(config.run_dir).status()
    assert status is not None
    assert status.state == "failed"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train.workers": 64},
            "64 workers x 0.5 cores are needed, the cluster has 2 cores: use train.workers=4 or less",
        ),
        (
            {"train.gpus_per_worker": 1.0},
            "1 workers x 1 GPUs are needed, the cluster has 0 GPUs: use train.gpus_per_worker=0",
        ),
    ],
)
def test_more_resources_than_the_cluster_has_are_refused(tiny: Config, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        worker_resources(with_values(tiny, values), {"CPU": 2.0})


def test_fewer_samples_than_a_batch_is_refused_before_a_worker_starts(ray: None, tiny: Config) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch"):
        train(with_values(tiny, {"name": "few", "train.global_batch": 10**6}))


def test_a_sequence_over_the_bundles_positions_is_refused(ray: None, tiny: Config, tmp_path: Path) -> None:
    from tests.engine.bundles.small_bundles import fresh_bundle

    bundle = fresh_bundle(tiny, tmp_path / "b" / "bundle")
    config = with_values(
        tiny,
        {
            "name": "long",
            "bundle": str(bundle.folder),
            "data.sequence_length": 400,
            "model.max_position_embeddings": None,
        },
    )
    with pytest.raises(UserError, match=r"over the 128 positions of .*: use data\.sequence_length=128"):
        train(config)

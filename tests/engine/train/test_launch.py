"""Training through real Ray Train workers: the same curve as without Ray, also when a worker is killed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.launch import train, worker_resources
from engine.train.run_folder import RunFolder
from engine.train.worker import Job, local_group, work

LONG = {  # a rate at which rounding, which differs between layouts, does not grow to 1e-5 in so many steps
    "train.max_steps": 60, "train.checkpoint_every": 5, "optim.lr": 2e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny: Config) -> list[dict[str, object]]:
    """Return the lines of the run in this process, on one rank."""
    config = with_values(tiny, {"name": "alone", "zero.stage": 0, **LONG})
    run = RunFolder(config.run_dir)
    run.logs.mkdir(parents=True)
    work(Job(config, prepare(tiny)), local_group())
    return list(run.metrics())


def train_workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def test_a_killed_worker_changes_nothing(ray: None, tiny: Config, alone: list[dict[str, float]]) -> None:
    config = with_values(
        tiny, {"name": "killed", "train.workers": 2, "zero.stage": 2, "train.cpus_per_worker": 1.0, **LONG}
    )
    run = RunFolder(config.run_dir)
    victims = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not victims:
            if len(list(run.metrics())) >= 12 and (workers := train_workers()):
                victims.append(workers[-1].pid)
                workers[-1].kill()
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = train(config)
    killer.join()
    assert victims, "the run was over before a worker could be killed"
    lines = list(run.metrics())
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], abs=1e-5)
    assert [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in alone]
    assert outcome.last["step"] == 60
    status = run.status()
    assert status is not None
    assert (status.state, status.step) == ("finished", 60)
    assert (run.bundle / "manta.json").exists()
    assert "worker-0.log" in {path.name for path in run.logs.iterdir()}
    # The same command once more has nothing to do.
    began = time.monotonic()
    assert train(config).last["loss"] == outcome.last["loss"]
    assert time.monotonic() - began < 2


def test_a_finished_run_goes_on_when_asked_for_more_steps(
    ray: None, tiny: Config, alone: list[dict[str, float]]
) -> None:
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


def test_a_loss_that_is_no_number_ends_in_one_sentence_without_restarts(ray: None, tiny: Config) -> None:
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
    ("values", "said"),
    [
        (
            {"train.workers": 64},
            "64 workers x 0.5 cores are asked, the cluster has 2 cores: use train.workers=4 or less",
        ),
        (
            {"train.gpus_per_worker": 1.0},
            "1 workers x 1 GPUs are asked, the cluster has 0 GPUs: use train.gpus_per_worker=0",
        ),
    ],
)
def test_more_than_there_is_is_refused(tiny: Config, values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        worker_resources(with_values(tiny, values), {"CPU": 2.0})


def test_fewer_samples_than_a_batch_is_refused_before_a_worker_starts(ray: None, tiny: Config) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch"):
        train(with_values(tiny, {"name": "few", "train.global_batch": 10**6}))


def test_a_sequence_over_the_bundles_positions_is_refused(ray: None, tiny: Config, tmp_path: Path) -> None:
    from tests.engine.bundles.making import fresh_bundle

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

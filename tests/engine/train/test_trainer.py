"""The worker group monitor, with workers that are plain objects: resizes, lost ranks, hung ranks. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from engine.train import trainer
from engine.train.run_folder import RunFolder
from engine.train.trainer import SPARE_AFTER_S, WorkerGroupMonitor


class WorkerGroup:
    """Workers on the given nodes."""

    def __init__(self, *nodes: str) -> None:
        self._workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node, pid=1)) for node in nodes]

    def get_workers(self) -> list[Any]:
        return self._workers


def status(errors: dict[int, Exception] | None = None, finished: bool = False) -> Any:
    return SimpleNamespace(errors=errors or {}, finished=finished)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    return folder


def test_a_resize_and_a_lost_rank_are_events(run: RunFolder, now: list[float]) -> None:
    monitor = WorkerGroupMonitor(run, 5.0, None)
    monitor.after_worker_group_start(WorkerGroup("a", "a"))
    assert not run.events.exists()
    monitor.after_worker_group_poll_status(status({1: RuntimeError("first line\nkilled by signal 9")}))
    assert "worker 1 was lost (killed by signal 9)" in run.events.read_text()
    monitor.after_worker_group_start(WorkerGroup("a"))
    assert "the run continues with 1 workers instead of 2" in run.events.read_text()


def test_a_hung_rank_ends_the_group(run: RunFolder, now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = WorkerGroupMonitor(run, 5.0, None)
    monkeypatch.setattr(monitor, "_kill_group", lambda: {0: "sleeping", 1: "stopped"})
    monitor.after_worker_group_start(WorkerGroup("a", "a"))
    monitor.after_worker_group_poll_status(status())
    now[0] += 1000
    monitor.after_worker_group_poll_status(status(finished=True))  # a finished group is not overdue
    with pytest.raises(WorkerGroupError, match=r"worker 0, 1 made no progress for 5 s \(worker 1 is stopped\)"):
        monitor.after_worker_group_poll_status(status())


def test_spare_processes_are_started_once_per_group_on_its_nodes(run: RunFolder, now: list[float]) -> None:
    started: list[tuple[int, str]] = []
    monitor = WorkerGroupMonitor(run, 1e6, lambda count, node_id: started.append((count, node_id)))
    monitor.after_worker_group_start(WorkerGroup("a", "a", "b"))
    monitor.after_worker_group_poll_status(status())
    assert started == []
    now[0] += SPARE_AFTER_S + 1
    monitor.after_worker_group_poll_status(status())
    monitor.after_worker_group_poll_status(status())
    assert started == [(2, "a"), (1, "b")]

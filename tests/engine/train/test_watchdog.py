"""Detection of hung ranks by heartbeats, and the stacks that a stopped process writes before it is killed."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.train.watchdog import SLOW_FACTOR, Heartbeat, HeartbeatMonitor, kill_hung_ranks

TIMEOUT_S = 5.0


def test_a_rank_is_overdue_by_the_monitors_clock(tmp_path: Path) -> None:
    files = [tmp_path / "0", tmp_path / "1"]
    files[0].write_text("99 99 0.1\n")  # of an earlier group
    monitor = HeartbeatMonitor(files, TIMEOUT_S, now=100.0)
    assert not files[0].exists()
    assert monitor.overdue_ranks(100.0 + TIMEOUT_S * SLOW_FACTOR) == []
    assert monitor.overdue_ranks(101.0 + TIMEOUT_S * SLOW_FACTOR) == [0, 1]  # neither has written a heartbeat
    heartbeats = [Heartbeat(file, TIMEOUT_S) for file in files]
    assert monitor.overdue_ranks(200.0) == []
    assert monitor.overdue_ranks(199.0 + TIMEOUT_S * SLOW_FACTOR) == []  # still starting
    for heartbeat in heartbeats:
        heartbeat.allow_slow(False)
    assert monitor.overdue_ranks(300.0) == []
    assert monitor.overdue_ranks(300.0 + TIMEOUT_S) == []
    assert monitor.overdue_ranks(300.1 + TIMEOUT_S) == [0, 1]
    heartbeats[1].allow_slow()
    assert monitor.overdue_ranks(400.0) == [0]
    heartbeats[1].remove()
    assert not files[1].exists()
    assert monitor.overdue_ranks(399.0 + TIMEOUT_S * SLOW_FACTOR) == [0]
    assert monitor.overdue_ranks(401.0 + TIMEOUT_S * SLOW_FACTOR) == [0, 1]


def test_beats_are_written_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("engine.train.watchdog.time.monotonic", lambda: now[0])
    heartbeat = Heartbeat(tmp_path / "0", 0.5)
    heartbeat.allow_slow(False)
    contents = set()
    for _ in range(1024):
        now[0] += 1 / 1024
        heartbeat.beat()
        contents.add((tmp_path / "0").read_text())
    assert len(contents) == 20  # the first, and one whenever a tenth of the timeout has passed
    Heartbeat().beat()  # without a file
    assert math.isinf(Heartbeat()._timeout_s)


SLEEPER = """
import sys, time
from pathlib import Path
from engine.train.watchdog import dump_stacks_on_signal
def deep_in_a_step():
    print("asleep", flush=True)
    time.sleep(60)
with dump_stacks_on_signal(Path(sys.argv[1])):
    deep_in_a_step()
"""


def test_a_stopped_process_writes_its_stacks_and_is_killed(tmp_path: Path) -> None:
    stacks = [tmp_path / "stopped.txt", tmp_path / "waits.txt"]
    processes = [
        subprocess.Popen([sys.executable, "-c", SLEEPER, str(file)], stdout=subprocess.PIPE, text=True)
        for file in stacks
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "asleep\n"
    processes[0].send_signal(signal.SIGSTOP)
    while [psutil.Process(process.pid).status() for process in processes] != ["stopped", "sleeping"]:
        time.sleep(0.01)
    statuses = kill_hung_ranks(
        {rank: (p.pid, str(file)) for rank, (p, file) in enumerate(zip(processes, stacks, strict=True))}
    )
    assert statuses == {0: "stopped", 1: "sleeping"}
    for process, file in zip(processes, stacks, strict=True):
        assert process.wait(60) == -signal.SIGKILL
        assert "deep_in_a_step" in file.read_text()
    assert kill_hung_ranks({0: (processes[0].pid, str(stacks[0]))}) == {}

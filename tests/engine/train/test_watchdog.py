"""Who is hung, by heartbeats and a clock; and what a stopped process still says before its end."""

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

LIMIT_S = 5.0


def test_a_rank_is_overdue_by_the_watchers_clock(tmp_path: Path) -> None:
    files = [tmp_path / "0", tmp_path / "1"]
    files[0].write_text("99 99 0.1\n")  # of a group before
    watcher = HeartbeatMonitor(files, LIMIT_S, now=100.0)
    assert not files[0].exists()
    assert watcher.overdue_ranks(100.0 + LIMIT_S * SLOW_FACTOR) == []
    assert watcher.overdue_ranks(101.0 + LIMIT_S * SLOW_FACTOR) == [0, 1]  # neither has ever moved
    hearts = [Heartbeat(file, LIMIT_S) for file in files]
    assert watcher.overdue_ranks(200.0) == []
    assert watcher.overdue_ranks(199.0 + LIMIT_S * SLOW_FACTOR) == []  # they start up still
    for heart in hearts:
        heart.slow(False)
    assert watcher.overdue_ranks(300.0) == []
    assert watcher.overdue_ranks(300.0 + LIMIT_S) == []
    assert watcher.overdue_ranks(300.1 + LIMIT_S) == [0, 1]
    hearts[1].slow()
    assert watcher.overdue_ranks(400.0) == [0]
    hearts[1].end()
    assert not files[1].exists()
    assert watcher.overdue_ranks(399.0 + LIMIT_S * SLOW_FACTOR) == [0]
    assert watcher.overdue_ranks(401.0 + LIMIT_S * SLOW_FACTOR) == [0, 1]


def test_beats_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("engine.train.watchdog.time.monotonic", lambda: now[0])
    heart = Heartbeat(tmp_path / "0", 0.5)
    heart.slow(False)
    contents = set()
    for _ in range(1024):
        now[0] += 1 / 1024
        heart.beat()
        contents.add((tmp_path / "0").read_text())
    assert len(contents) == 20  # the first, and one each time that more than a tenth of the limit is over
    Heartbeat().beat()  # of a run that nobody watches
    assert math.isinf(Heartbeat()._limit_s)


SLEEPER = """
import sys, time
from pathlib import Path
from engine.train.watchdog import stack_on_signal
def deep_in_a_step():
    print("asleep", flush=True)
    time.sleep(60)
with stack_on_signal(Path(sys.argv[1])):
    deep_in_a_step()
"""


def test_a_stopped_process_writes_its_stack_and_ends(tmp_path: Path) -> None:
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
    found = kill_hung_ranks({rank: (p.pid, str(file)) for rank, (p, file) in enumerate(zip(processes, stacks, strict=True))})
    assert found == {0: "stopped", 1: "sleeping"}
    for process, file in zip(processes, stacks, strict=True):
        assert process.wait(60) == -signal.SIGKILL
        assert "deep_in_a_step" in file.read_text()
    assert kill_hung_ranks({0: (processes[0].pid, str(stacks[0]))}) == {}

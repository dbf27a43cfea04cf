"""Detection of hung ranks: each rank writes a heartbeat file, a monitor finds those that stopped, and their node kills them.

A hung rank cannot report itself, and the other ranks wait for it inside a collective. So each rank updates a small file as
it goes, and the process that started the ranks checks that all files still change. It uses only its own clock, since the
clocks of machines need not agree.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SLOW_FACTOR = 10.0  # on the timeout: for startup, the first step (which may compile) and writing the final files
DUMP_SIGNAL = signal.SIGUSR1  # makes a rank write its Python stacks
DUMP_TIMEOUT_S = 3.0  # for a rank to write its stacks


class Heartbeat:
    """One rank's heartbeat file: a count of beats, and the seconds after which the next one is overdue."""

    def __init__(self, file: Path | None = None, timeout_s: float = math.inf) -> None:
        """Write to `file`, if any; a beat is overdue after `timeout_s`, and after `SLOW_FACTOR` times that at first."""
        self._file, self._timeout_s = file, timeout_s
        self._count, self._slow, self._written_at = 0, True, 0.0
        self._write()

    def beat(self) -> None:
        """Record progress. Reads a clock, and writes a small file now and then."""
        self._count += 1
        if time.monotonic() - self._written_at > min(1.0, self._timeout_s / 10):
            self._write()

    def allow_slow(self, slow: bool = True) -> None:
        """Turn the longer timeout on for a phase that may take long, or off again."""
        self._count += 1
        if slow != self._slow:
            self._slow = slow
            self._write()

    def remove(self) -> None:
        """Delete the file."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._file is None:
            return
        self._written_at = time.monotonic()
        timeout_s = self._timeout_s * (SLOW_FACTOR if self._slow else 1.0)
        with contextlib.suppress(OSError):  # on a full disk the old content stays: at worst the rank looks hung
            self._file.write_text(f"{os.getpid()} {self._count} {timeout_s}\n")


@dataclass
class _LastBeat:
    content: str
    changed_at: float
    timeout_s: float


class HeartbeatMonitor:
    """Checks the heartbeat files of a worker group."""

    def __init__(self, files: Sequence[Path], timeout_s: float, now: float) -> None:
        """Monitor a group that starts at `now` (seconds of any monotonic clock); files of an earlier group are deleted."""
        self._files = files
        self._last_beats = [_LastBeat("", now, timeout_s * SLOW_FACTOR) for _ in files]
        for file in files:
            file.unlink(missing_ok=True)

    def overdue_ranks(self, now: float) -> list[int]:
        """Return the ranks whose heartbeat is overdue."""
        for last, file in zip(self._last_beats, self._files, strict=True):
            content = file.read_text() if file.exists() else ""
            if content != last.content and content.endswith("\n"):
                last.content, last.changed_at, last.timeout_s = content, now, float(content.split()[2])
        return [rank for rank, last in enumerate(self._last_beats) if now - last.changed_at > last.timeout_s]


@contextlib.contextmanager
def dump_stacks_on_signal(file: Path) -> Iterator[None]:
    """Append the Python stacks of all threads of this process to `file` whenever it receives DUMP_SIGNAL."""
    with file.open("a") as stacks:
        faulthandler.register(DUMP_SIGNAL, stacks, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(DUMP_SIGNAL)
    if not file.stat().st_size:
        file.unlink()


def kill_hung_ranks(processes: dict[int, tuple[int, str]]) -> dict[int, str]:
    """Have ranks of this node write their stacks, then kill them: {rank: (process id, stack file)} -> {rank: process status}.

    A stopped process is continued for as long as writing takes.
    """
    statuses, sizes = {}, {}
    for rank, (pid, file) in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            statuses[rank] = psutil.Process(pid).status()
            sizes[rank] = Path(file).stat().st_size if Path(file).exists() else 0
            os.kill(pid, DUMP_SIGNAL)
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + DUMP_TIMEOUT_S
    while time.monotonic() < deadline and any(
        not Path(processes[rank][1]).exists() or Path(processes[rank][1]).stat().st_size <= sizes[rank]
        for rank in statuses
    ):
        time.sleep(0.02)
    time.sleep(0.1)  # for stacks that are half written
    for rank in statuses:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank][0], signal.SIGKILL)
    return statuses

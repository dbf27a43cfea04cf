"""Ranks that hang or are stopped: how a rank says that it moves, how others notice that it doesn't, how it is ended.

A hung rank can't tell of itself, and its peers wait for it inside a collective. So each rank changes a small file as it
goes, and whoever starts the ranks looks whether all still change (by its own clock: machines need not agree on time).
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

SLOW = 10.0  # times the limit that starting up, the first step (a compiler may run) and the last files may take
DUMP = signal.SIGUSR1  # makes a rank write its Python stack
DUMP_S = 3.0  # that it may take to do so


class Heartbeat:
    """One rank's sign of life: its count of beats, and the seconds until the next one is overdue."""

    def __init__(self, file: Path | None = None, limit_s: float = math.inf) -> None:
        """Write to `file`, if any; a beat is overdue after `limit_s`, `SLOW` times that at first."""
        self._file, self._limit_s = file, limit_s
        self._count, self._slow, self._written = 0, True, 0.0
        self._write()

    def beat(self) -> None:
        """Say that the rank moves. Costs a clock's reading, and a small file now and then."""
        self._count += 1
        if time.monotonic() - self._written > min(1.0, self._limit_s / 10):
            self._write()

    def slow(self, slow: bool = True) -> None:
        """Say that what comes now may take long, or no longer."""
        self._count += 1
        if slow != self._slow:
            self._slow = slow
            self._write()

    def end(self) -> None:
        """Leave nothing behind."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._file is None:
            return
        self._written = time.monotonic()
        limit_s = self._limit_s * (SLOW if self._slow else 1.0)
        with contextlib.suppress(OSError):  # a full disk is no hang: the content stays, and is found late at worst
            self._file.write_text(f"{os.getpid()} {self._count} {limit_s}\n")


@dataclass
class _Seen:
    content: str
    since: float
    limit_s: float


class Watcher:
    """Looks at the heartbeats of a group of ranks."""

    def __init__(self, files: Sequence[Path], limit_s: float, now: float) -> None:
        """Watch a group that starts at `now` (seconds of any steady clock); heartbeats of one before it are removed."""
        self._files = files
        self._seen = [_Seen("", now, limit_s * SLOW) for _ in files]
        for file in files:
            file.unlink(missing_ok=True)

    def overdue(self, now: float) -> list[int]:
        """Return the ranks that have not moved for longer than they may."""
        for seen, file in zip(self._seen, self._files, strict=True):
            content = file.read_text() if file.exists() else ""
            if content != seen.content and content.endswith("\n"):
                seen.content, seen.since, seen.limit_s = content, now, float(content.split()[2])
        return [rank for rank, seen in enumerate(self._seen) if now - seen.since > seen.limit_s]


@contextlib.contextmanager
def stack_on_signal(file: Path) -> Iterator[None]:
    """Let this process append its threads' Python stacks to `file` whenever it gets the signal DUMP, whatever it does."""
    with file.open("a") as stacks:
        faulthandler.register(DUMP, stacks, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(DUMP)
    if not file.stat().st_size:
        file.unlink()


def end_hung(processes: dict[int, tuple[int, str]]) -> dict[int, str]:
    """Have ranks of this node write their stacks, then kill them: {rank: (process id, stack file)} -> {rank: its state}.

    A stopped process is woken for the moment that it takes to write.
    """
    found, sizes = {}, {}
    for rank, (pid, file) in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            found[rank] = psutil.Process(pid).status()
            sizes[rank] = Path(file).stat().st_size if Path(file).exists() else 0
            os.kill(pid, DUMP)
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + DUMP_S
    while time.monotonic() < deadline and any(
        not Path(processes[rank][1]).exists() or Path(processes[rank][1]).stat().st_size <= sizes[rank]
        for rank in found
    ):
        time.sleep(0.02)
    time.sleep(0.1)  # to the end of a stack that has begun
    for rank in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank][0], signal.SIGKILL)
    return found

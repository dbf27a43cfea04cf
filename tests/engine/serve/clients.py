"""Clients that keep asking an endpoint, and note what they get."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil


def wait_for(true: Callable[[], object], seconds: float = 120) -> None:
    """Look again and again until something holds; fail where it doesn't within a time that no slow machine needs."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes(name: str) -> list[psutil.Process]:
    """Return the processes of this session's Ray whose titles hold a name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def metrics_at_rest(url: str) -> list[str]:
    """Return the lines of /metrics once no other request is under way: what a client did is counted a moment later."""
    lines: list[str] = []

    def at_rest() -> bool:
        lines[:] = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        return "manta_requests_in_flight 1.0" in lines  # the one that asks

    wait_for(at_rest)
    return lines


@dataclass
class Noted:
    """One request: its user, when it began and ended (seconds, monotonic), its status (0: no answer), who answered."""

    user: str
    began: float
    ended: float
    status: int
    version: str
    body: dict[str, Any] = field(default_factory=dict)


@contextmanager
def load(url: str, body: dict[str, Any], clients: int = 3, path: str = "/v1/completions", pause_s: float = 0.0) -> Iterator[list[Noted]]:  # fmt: skip
    """Ask from several threads during a block, each request as another user; the list grows meanwhile."""
    noted: list[Noted] = []
    numbers, over = itertools.count(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=90) as client:
            while not over.is_set():
                began = time.monotonic()
                user = f"user {next(numbers)}"
                asked = body | ({"user": user} if "completions" in path else {})
                try:
                    answer = client.post(path, json=asked)
                    found = Noted(user, began, time.monotonic(), answer.status_code, answer.headers.get("x-manta-version", ""), answer.json())  # fmt: skip
                except (httpx.HTTPError, ValueError):
                    found = Noted(user, began, time.monotonic(), 0, "")
                noted.append(found)
                time.sleep(pause_s)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield noted
    finally:
        over.set()
        for thread in threads:
            thread.join()


def said_until(process: subprocess.Popen[str], words: str) -> str:
    """Return what a process says, up to the line with these words. Raises AssertionError if it ends before."""
    assert process.stdout
    said = ""
    while words not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said

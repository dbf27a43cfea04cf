"""Helpers of endpoint tests: waiting, processes, metrics, and clients that send requests in the background."""

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


def wait_for(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Poll until a condition holds. Raises AssertionError after the timeout, which is ample for a slow machine."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes(name: str) -> list[psutil.Process]:
    """Return the processes of this session's Ray whose command lines contain a name."""
    matches = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            if name in " ".join(process.cmdline()):
                matches.append(process)
    return matches


def metrics_at_rest(url: str) -> list[str]:
    """Return the lines of /metrics once no other request is in flight: requests are counted shortly after their response."""
    lines: list[str] = []

    def is_idle() -> bool:
        lines[:] = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        return "manta_requests_in_flight 1.0" in lines  # this one

    wait_for(is_idle)
    return lines


@dataclass
class CompletedRequest:
    """One request: its user, its times (seconds, monotonic), its status (0: no response), the version that answered."""

    user: str
    started_at: float
    finished_at: float
    status: int
    version: str
    body: dict[str, Any] = field(default_factory=dict)


@contextmanager
def background_load(url: str, body: dict[str, Any], clients: int = 3, path: str = "/v1/completions", pause_s: float = 0.0) -> Iterator[list[CompletedRequest]]:  # fmt: skip
    """Send requests from several threads during a block, each as another user; the yielded list grows meanwhile."""
    requests: list[CompletedRequest] = []
    numbers, stopping = itertools.count(), threading.Event()

    def send_requests() -> None:
        with httpx.Client(base_url=url, timeout=90) as client:
            while not stopping.is_set():
                started_at = time.monotonic()
                user = f"user {next(numbers)}"
                request = body | ({"user": user} if "completions" in path else {})
                try:
                    response = client.post(path, json=request)
                    completed = CompletedRequest(user, started_at, time.monotonic(), response.status_code, response.headers.get("x-manta-version", ""), response.json())  # fmt: skip
                except (httpx.HTTPError, ValueError):
                    completed = CompletedRequest(user, started_at, time.monotonic(), 0, "")
                requests.append(completed)
                time.sleep(pause_s)

    threads = [threading.Thread(target=send_requests) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield requests
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return a process' output up to the line with a text. Raises AssertionError if it ends before."""
    assert process.stdout
    output = ""
    while text not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    return output

"""Clients that keep asking an endpoint, and note what they get."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


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

"""Ports: what processes listen on, and one for a test's own server."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable

import psutil

from cluster.ports import bindable

OURS = range(20_000, 30_000)  # below those that the system and Ray give to whoever asks for any, servers and clients
_given: set[int] = set()


def free_port() -> int:
    """Return a port of this machine that nobody listens on, and another one each time."""
    while (port := random.SystemRandom().choice(OURS)) in _given or not bindable(port):
        pass
    _given.add(port)
    return port


def listened(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the addresses that these processes listen on, those still alive."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found

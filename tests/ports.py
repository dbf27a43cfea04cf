"""TCP ports: a free one for a test's server, and the addresses that processes listen on."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable

import psutil

from cluster.ports import is_bindable

# Below the ports that the system and Ray hand out; each process of a parallel test run has a thousand of its own.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = range(20_000 + 1_000 * (WORKER % 10), 21_000 + 1_000 * (WORKER % 10))
_given: set[int] = set()


def free_port() -> int:
    """Return a free port, another one each time."""
    while (port := random.SystemRandom().choice(PORTS)) in _given or not is_bindable(port):
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

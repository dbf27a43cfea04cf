"""What processes listen on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def listened(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the addresses that these processes listen on, those still alive."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found

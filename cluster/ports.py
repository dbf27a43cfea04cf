"""TCP ports of this machine: who holds one, and which is free."""

from __future__ import annotations

import socket

import psutil

from cluster.errors import ClusterError


def port_holder(port: int) -> str | None:
    """Return 'name (pid 123)' of the process that listens on a TCP port, 'another process' if it can't be seen, or None."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            if connection.pid is None:
                return "another process"
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.NoSuchProcess:
                return None
    return None if is_bindable(port) else "another process"


def is_bindable(port: int) -> bool:
    """Say whether a server could listen on this port of loopback now."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def free_port(start: int, tries: int = 100) -> int:
    """Return the first free port at or after `start`. Raises ClusterError if none of `tries` is."""
    for port in range(start, min(start + tries, 65536)):
        if is_bindable(port):
            return port
    raise ClusterError(f"no port from {start} to {start + tries - 1} is free: give another one to start from")

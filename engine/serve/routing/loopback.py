"""Binds a Serve replica's gRPC port to loopback: Ray 2.60 binds each to all interfaces, for calls that nobody makes.

Whatever arrives at that port is unpickled, without authentication. Handles use Ray's own calls unless
RAY_SERVE_USE_GRPC_BY_DEFAULT is set; then the port is needed and stays as Ray binds it.
"""

from __future__ import annotations

import sys
from typing import Any

REPLICA_MODULE = "ray.serve._private.replica"
ALL_INTERFACES, LOOPBACK = "[::]:", "127.0.0.1:"


def bind_to_loopback() -> None:
    """Make the Serve replica that starts in this process listen on 127.0.0.1 only; do nothing in other processes."""
    replica_module: Any = sys.modules.get(REPLICA_MODULE)
    if replica_module is None:
        return
    from ray._common.tls_utils import add_port_to_grpc_server
    from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT

    def add_loopback_port(server: Any, address: str) -> Any:
        return add_port_to_grpc_server(server, address.replace(ALL_INTERFACES, LOOPBACK))

    if not RAY_SERVE_USE_GRPC_BY_DEFAULT:
        replica_module.add_port_to_grpc_server = add_loopback_port

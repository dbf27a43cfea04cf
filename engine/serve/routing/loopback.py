"""Keeps a Serve replica off the network: Ray 2.60 has each listen on all interfaces, for calls by gRPC that nobody makes.

What comes there is unpickled, and no token is asked for. Handles go by Ray's own calls unless RAY_SERVE_USE_GRPC_BY_DEFAULT
is set; with it the port is needed, and stays as Ray opens it.
"""

from __future__ import annotations

import sys
from typing import Any

SERVE = "ray.serve._private.replica"
EVERYWHERE, HERE = "[::]:", "127.0.0.1:"


def stay_on_loopback() -> None:
    """Have the replica that this process is, and which is still beginning, listen on 127.0.0.1 only; elsewhere do nothing."""
    replica: Any = sys.modules.get(SERVE)
    if replica is None:
        return
    from ray._common.tls_utils import add_port_to_grpc_server
    from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT

    def add_port(server: Any, address: str) -> Any:
        return add_port_to_grpc_server(server, address.replace(EVERYWHERE, HERE))

    if not RAY_SERVE_USE_GRPC_BY_DEFAULT:
        replica.add_port_to_grpc_server = add_port

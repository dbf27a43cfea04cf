"""Rendezvous of a run's ranks. The store listens on its node's address only, unlike torch's default, which listens on all."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from ipaddress import ip_address

import psutil

BACKLOG = 2048  # all ranks may connect at once
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # how long a rank waits for the others
_open_sockets: dict[tuple[str, int], socket.socket] = {}  # on rank 0's node: opened, not yet used by a store


def open_port(host: str) -> tuple[str, int]:
    """Open a free port on `host`, an address of this node, for `init_process_group` as rank 0 of this process; return both."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.create_server((host, 0), family=family, backlog=BACKLOG)
    address = (host, int(opened.getsockname()[1]))
    _open_sockets[address] = opened
    return address


def init_process_group(
    rank: int,
    world_size: int,
    address: tuple[str, int],
    node_address: str,
    cuda: bool,
    timeout: timedelta | None = None,
) -> None:
    """Initialize torch's process group, with NCCL or else Gloo; `timeout` limits its collectives.

    `address` is what rank 0's `open_port` returned; `node_address` is this node's own address.
    """
    import torch.distributed as dist

    host, port = address
    if interface := network_interface(node_address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if ip_address(node_address).is_loopback:  # on a real network NCCL chooses, and may use several interfaces
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    listen_fd = _open_sockets.pop(address).detach() if rank == 0 else None  # the store closes it
    store = dist.TCPStore(
        host, port, world_size, rank == 0, RENDEZVOUS_TIMEOUT, wait_for_workers=False, master_listen_fd=listen_fd
    )
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def network_interface(host: str) -> str | None:
    """Return the name of the network interface that has the address `host`."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(item.address == host for item in addresses)), None)

"""Where the ranks of a run meet. They listen on their node's address alone, where torch's own way listens on all."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from ipaddress import ip_address

import psutil

BACKLOG = 2048  # ranks may all come at once
MEET = timedelta(minutes=30)  # that a rank waits for the others
_open: dict[tuple[str, int], socket.socket] = {}  # on rank 0's node: opened, and not yet met at


def open_port(host: str) -> tuple[str, int]:
    """Open a free port of `host`, an address of this node, for `meet` in this process as rank 0; return both."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.create_server((host, 0), family=family, backlog=BACKLOG)
    address = (host, int(opened.getsockname()[1]))
    _open[address] = opened
    return address


def meet(
    rank: int, world: int, address: tuple[str, int], here: str, cuda: bool, limit: timedelta | None = None
) -> None:
    """Start the process group of `world` ranks, by NCCL or else by Gloo; its collectives may take up to `limit`.

    `address` is what rank 0's `open_port` returned; `here` is this node's own address.
    """
    import torch.distributed as dist

    host, port = address
    if card := interface(here):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
        if ip_address(here).is_loopback:  # on a real network NCCL chooses, and may use several cards
            os.environ.setdefault("NCCL_SOCKET_IFNAME", card)
    opened = _open.pop(address).detach() if rank == 0 else None  # the store closes it
    store = dist.TCPStore(host, port, world, rank == 0, MEET, wait_for_workers=False, master_listen_fd=opened)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=limit)


def interface(host: str) -> str | None:
    """Return the name of the network interface that has the address `host`."""
    cards = psutil.net_if_addrs().items()
    return next((name for name, addresses in cards if any(one.address == host for one in addresses)), None)

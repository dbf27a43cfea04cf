"""The ranks' meeting point: it listens on the node's address alone."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import psutil
import torch
import torch.distributed as dist

from engine.train.rendezvous import network_interface, init_process_group, open_port
from tests.ports import listened


def rank(number: int, own: Connection, other: Connection) -> None:
    """Meet the other rank, add up a number, and send it with all addresses that this process listens on."""
    address = open_port("127.0.0.1") if number == 0 else other.recv()
    if number == 0:
        own.send(address)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    init_process_group(number, 2, address, "127.0.0.1", cuda=False)
    total = torch.tensor([number + 1])
    dist.all_reduce(total)
    found = listened([psutil.Process()])
    dist.barrier()
    own.send((int(total), found))
    dist.destroy_process_group()
    os._exit(0)


def test_ranks_meet_and_listen_on_loopback_alone() -> None:
    context = multiprocessing.get_context("spawn")
    (first, told), (second, heard) = context.Pipe(), context.Pipe()
    beside, asked = context.Pipe()
    ranks = [context.Process(target=rank, args=(0, told, told)), context.Process(target=rank, args=(1, heard, asked))]
    for one in ranks:
        one.start()
    try:
        beside.send(first.recv())
        found = [first.recv(), second.recv()]
    finally:
        for one in ranks:
            one.join(60)
            one.kill()
    assert found == [(3, {"127.0.0.1"})] * 2


def test_the_interface_of_an_address() -> None:
    assert network_interface("127.0.0.1") == "lo"
    assert network_interface("203.0.113.1") is None

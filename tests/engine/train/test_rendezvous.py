"""Rendezvous: the ranks connect, and listen on the node's address only."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import psutil
import torch
import torch.distributed as dist

from engine.train.rendezvous import init_process_group, network_interface, open_port
from tests.ports import listened


def run_rank(rank: int, own: Connection, other: Connection) -> None:
    """Join the other rank, all-reduce a number, and send it with all addresses that this process listens on."""
    address = open_port("127.0.0.1") if rank == 0 else other.recv()
    if rank == 0:
        own.send(address)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    init_process_group(rank, 2, address, "127.0.0.1", cuda=False)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    addresses = listened([psutil.Process()])
    dist.barrier()
    own.send((int(total), addresses))
    dist.destroy_process_group()
    os._exit(0)


def test_ranks_connect_and_listen_on_loopback_only() -> None:
    context = multiprocessing.get_context("spawn")
    (results_0, own_0), (results_1, own_1) = context.Pipe(), context.Pipe()
    address_out, address_in = context.Pipe()
    ranks = [
        context.Process(target=run_rank, args=(0, own_0, own_0)),
        context.Process(target=run_rank, args=(1, own_1, address_in)),
    ]
    for process in ranks:
        process.start()
    try:
        address_out.send(results_0.recv())
        results = [results_0.recv(), results_1.recv()]
    finally:
        for process in ranks:
            process.join(60)
            process.kill()
    assert results == [(3, {"127.0.0.1"})] * 2


def test_the_network_interface_of_an_address() -> None:
    assert network_interface("127.0.0.1") == "lo"
    assert network_interface("203.0.113.1") is None

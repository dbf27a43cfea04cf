"""Runs training jobs on several ranks, in separate processes, without Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder

IMPORTS = [
    "deepspeed", "engine.train.worker", "engine.objectives.causal_lm", "engine.bundles.bundle",
    "transformers.models.llama.modeling_llama", "tests.engine.train.ranks",
]  # fmt: skip


def run_ranks(jobs: list[TrainJob], world_size: int) -> list[list[dict[str, Any]]]:
    """Run the jobs one after the other on one group of `world_size` processes; return each job's metric lines."""
    on_ranks(train_jobs, world_size, json.dumps([job.to_dict() for job in jobs]))
    return [list(RunFolder(job.config.run_dir).metrics()) for job in jobs]


def run_here(jobs: list[TrainJob]) -> list[list[dict[str, Any]]]:
    """Run the jobs one after the other in this process, on one rank; return each job's metric lines."""
    from engine.train.worker import single_process_group, train_worker

    for job in jobs:
        RunFolder(job.config.run_dir).logs.mkdir(parents=True, exist_ok=True)
        train_worker(job, single_process_group())
    return [list(RunFolder(job.config.run_dir).metrics()) for job in jobs]


def on_ranks(function: Callable[..., None], world_size: int, *args: object, fresh: bool = False) -> None:
    """Call `function(rank, world_size, *args)` in each process of a group. Raises what one of them raises.

    The processes are forked from one that has done all imports, which take most of the time of a short job; with `fresh`
    they are new processes that share no memory, so that their memory can be measured.
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    if not fresh:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
        multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        process_args = (world_size, dict(environment), f"{folder}/store", function, args)
        mp.start_processes(_rank, process_args, nprocs=world_size, start_method="spawn" if fresh else "forkserver")


def _rank(
    rank: int,
    world_size: int,
    environment: dict[str, str],
    store: str,
    function: Callable[..., None],
    args: tuple[object, ...],
) -> None:
    os.environ.clear()
    os.environ.update(
        environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    function(rank, world_size, *args)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a thread of torch that takes the GIL during interpreter shutdown would end the process with SIGABRT


def train_jobs(rank: int, world_size: int, specs: str) -> None:
    """Run one rank of each job in `specs`, the jobs as JSON."""
    from engine.train.process_group import ProcessGroup
    from engine.train.worker import train_worker

    for spec in json.loads(specs):
        job = TrainJob.from_dict(spec)
        RunFolder(job.config.run_dir).logs.mkdir(parents=True, exist_ok=True)
        train_worker(job, ProcessGroup(rank, world_size, torch.device("cpu")))


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Return the loss of each step."""
    return [line["loss"] for line in lines]

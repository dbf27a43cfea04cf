"""Ray Train's trainer for our ranks, which starts in half the time of its TorchTrainer.

The ranks meet as TorchConfig has them meet, but torch stays out of the driver, the controller and its helpers, each of
which would spend a second on importing it; and helper processes that a run of ours has no use for are not started.
"""

from __future__ import annotations

import os
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray's class has no types
    """A DataParallelTrainer without the process that splits Ray datasets: our ranks read their shards themselves."""

    def __init__(self, own_ray: bool, **options: Any) -> None:
        """Make a trainer; `own_ray`: Ray ends with this process, and its placement groups with it."""
        super().__init__(**options)
        self._unused = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if own_ray else set())

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in self._unused
        ]


class Rendezvous(Backend):
    """Gives each rank the address of rank 0."""

    share_cuda_visible_devices = True  # a rank sees its node's devices, so NCCL can use their links

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Find an address on rank 0's node and tell all ranks of it."""
        host, port = worker_group.execute_single(0, free_address)
        worker_group.execute(set_address, host, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Leave the process group, which frees the devices' communicators."""
        worker_group.execute(leave)


class RendezvousConfig(BackendConfig):
    """Names the backend to Ray Train."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend."""
        return Rendezvous


def free_address() -> tuple[str, int]:
    """Return this node's address and a port that is free on it."""
    from ray.train._internal.utils import get_address_and_port

    host, port = get_address_and_port()
    return host, port


def set_address(host: str, port: int) -> None:
    """Keep rank 0's address where torch looks for it."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))


def join() -> Any:
    """Join the run's process group: NCCL where Ray gave the rank a GPU, else Gloo. Returns this rank's Group."""
    import ray.train
    import torch
    import torch.distributed as dist

    from engine.train.group import Group

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()), NODE_RANK=str(context.get_node_rank()),
    )  # fmt: skip
    device = torch.device("cpu")
    if torch.cuda.is_available() and ray.get_gpu_ids():
        import ray.train.torch

        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    return Group(rank, world, device)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()

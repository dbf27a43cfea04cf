"""Ray Train's trainer for our ranks, which starts in half the time of its TorchTrainer.

The ranks meet as TorchConfig has them meet, but torch stays out of the driver, the controller and its helpers, each of
which would spend a second on importing it; and helper processes that a run of ours has no use for are not started.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.train.elastic import Elastic
from engine.train.rendezvous import meet, open_port
from engine.train.run_folder import RunFolder
from engine.train.watchdog import DUMP_S, Watcher, end_hung

SPARE_AFTER_S = 30.0  # short runs shall not pay for processes that they don't need
Spare = Callable[..., None]  # (count, node_id=...): starts processes that are ready to be ranks
REACH_S = 30.0  # to start a process on a node with a hung rank


class RayTrainer(DataParallelTrainer):  # type: ignore[misc]  # Ray's class has no types
    """A DataParallelTrainer without the process that splits Ray datasets: our ranks read their shards themselves."""

    def __init__(
        self, run: RunFolder, own_ray: bool, hang_timeout_s: float, spare: Spare | None = None, **options: Any
    ) -> None:
        """Make a trainer of `run`; `own_ray`: Ray ends with this process, and its placement groups with it."""
        super().__init__(**options)
        self._run, self._attendant = run, WorkerGroupMonitor(run, hang_timeout_s, spare)
        self._unused = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if own_ray else set())

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [callback for callback in callbacks if type(callback).__name__ not in self._unused]
        return [*kept, self._attendant]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling: Any = self.scaling_config
        if scaling.elasticity_enabled:
            parts["scaling_policy"] = Elastic(scaling, self._run.checkpoints)
        return super()._initialize_and_run_controller(**parts)


class WorkerGroupMonitor(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Sits in Ray Train's controller: finds ranks that hang and ends their group; tells what becomes of the workers."""

    def __init__(self, run: RunFolder, hang_timeout_s: float, spare: Spare | None) -> None:
        """Watch the ranks of `run`, and have `spare` start processes for its next group."""
        self._run, self._hang_timeout_s, self._spare = run, hang_timeout_s, spare
        self._workers: list[Any] = []
        self._size = 0

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Begin to watch a group."""
        self._workers = worker_group.get_workers()
        if self._size and len(self._workers) != self._size:
            self._run.tell(f"the run goes on with {len(self._workers)} workers instead of {self._size}")
        self._size = len(self._workers)
        files = [self._run.heartbeat(rank) for rank in range(self._size)]
        self._started, self._spared = time.monotonic(), self._spare is None
        self._watcher = Watcher(files, self._hang_timeout_s, self._started)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Tell of lost ranks; end a group in which a rank hangs. Raises WorkerGroupError then, which restarts it."""
        if errors := worker_group_status.errors:
            reason = (str(errors[min(errors)]).strip().splitlines() or ["no reason is known"])[-1][:200]
            self._run.tell(f"worker {', '.join(map(str, sorted(errors)))} was lost ({reason})")
            return
        if worker_group_status.finished:
            return
        if not self._spared and time.monotonic() - self._started > SPARE_AFTER_S:
            self._start_spares()
        if late := self._watcher.overdue(time.monotonic()):
            states = self._end_group()
            stopped = sorted(rank for rank in late if states.get(rank) == "stopped")
            culprit = f"worker {', '.join(map(str, stopped))} is stopped" if stopped else "none of them is stopped"
            text = (
                f"worker {', '.join(map(str, late))} made no progress for {self._hang_timeout_s:g} s ({culprit}): "
                f"the group is ended, its Python stacks are in {self._run.logs}/stacks-worker-*.txt"
            )
            self._run.tell(text)
            raise WorkerGroupError(text, {rank: TimeoutError(text) for rank in late})

    def _start_spares(self) -> None:
        """Start a process for each rank of the next group, on its node."""
        assert self._spare is not None
        self._spared = True
        for node, count in Counter(worker.metadata.node_id for worker in self._workers).items():
            self._spare(count, node_id=node)

    def _end_group(self) -> dict[int, str]:
        nodes: dict[str, dict[int, tuple[int, str]]] = {}
        for rank, worker in enumerate(self._workers):
            nodes.setdefault(worker.metadata.node_id, {})[rank] = (worker.metadata.pid, str(self._run.stacks(rank)))
        task = ray.remote(num_cpus=0)(end_hung)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(ranks)
            for node, ranks in nodes.items()
        ]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=REACH_S + DUMP_S)
        states: dict[int, str] = {}
        for answer in done:
            try:
                states |= ray.get(answer)
            except ray.exceptions.RayError:  # the node is gone, and its ranks with it
                continue
        return states


class Rendezvous(Backend):
    """Gives each rank the address of rank 0."""

    share_cuda_visible_devices = True  # a rank sees its node's devices, so NCCL can use their links

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Open a port on rank 0's node and tell all ranks of it."""
        host, port = worker_group.execute_single(0, open_address)
        worker_group.execute(set_address, host, port)


class RendezvousConfig(BackendConfig):
    """Names the backend to Ray Train."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend."""
        return Rendezvous


def open_address() -> tuple[str, int]:
    """Open a port on this node's address, where rank 0 is; return both."""
    return open_port(ray.util.get_node_ip_address())


def set_address(host: str, port: int) -> None:
    """Keep rank 0's address for `join`."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))


def join() -> Any:
    """Join the run's process group: NCCL where Ray gave the rank a GPU, else Gloo. Returns this rank's Group."""
    import ray.train
    import torch

    from engine.train.process_group import Group

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
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    meet(rank, world, address, ray.util.get_node_ip_address(), device.type == "cuda")
    return Group(rank, world, device)

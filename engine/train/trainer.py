"""Ray Train trainer for our ranks; it starts in half the time of Ray's TorchTrainer.

The process group is set up as TorchConfig does it, but driver and controller do not import torch, which takes a second in
each; and helper processes that our runs do not need are not started.
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

from engine.train.elastic import ElasticPolicy
from engine.train.rendezvous import init_process_group, open_port
from engine.train.run_folder import RunFolder
from engine.train.watchdog import DUMP_TIMEOUT_S, HeartbeatMonitor, kill_hung_ranks

SPARE_AFTER_S = 30.0  # short runs do not need spare processes
StartSpares = Callable[..., None]  # (count, node_id=...): starts worker processes in advance
KILL_TASK_TIMEOUT_S = 30.0  # to start a task on the node of a hung rank


class RayTrainer(DataParallelTrainer):  # type: ignore[misc]  # Ray's class has no types
    """A DataParallelTrainer without the process that splits Ray datasets: our ranks read their shards themselves."""

    def __init__(
        self,
        run: RunFolder,
        own_ray: bool,
        hang_timeout_s: float,
        start_spares: StartSpares | None = None,
        **options: Any,
    ) -> None:
        """Create the trainer of `run`; `own_ray`: the Ray cluster ends with this process, and its placement groups with it."""
        super().__init__(**options)
        self._run, self._monitor = run, WorkerGroupMonitor(run, hang_timeout_s, start_spares)
        self._unused_callbacks = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if own_ray else set())

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        used = [callback for callback in callbacks if type(callback).__name__ not in self._unused_callbacks]
        return [*used, self._monitor]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling: Any = self.scaling_config
        if scaling.elasticity_enabled:
            parts["scaling_policy"] = ElasticPolicy(scaling, self._run.checkpoints)
        return super()._initialize_and_run_controller(**parts)


class WorkerGroupMonitor(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Runs in Ray Train's controller: detects hung ranks, ends their worker group, and reports lost workers and resizes."""

    def __init__(self, run: RunFolder, hang_timeout_s: float, start_spares: StartSpares | None) -> None:
        """Monitor the ranks of `run`; `start_spares` starts worker processes for the next group in advance."""
        self._run, self._hang_timeout_s, self._start_spares = run, hang_timeout_s, start_spares
        self._workers: list[Any] = []
        self._size = 0

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Start to monitor a worker group."""
        self._workers = worker_group.get_workers()
        if self._size and len(self._workers) != self._size:
            self._run.report_event(f"the run continues with {len(self._workers)} workers instead of {self._size}")
        self._size = len(self._workers)
        files = [self._run.heartbeat(rank) for rank in range(self._size)]
        self._started_at, self._has_spares = time.monotonic(), self._start_spares is None
        self._heartbeats = HeartbeatMonitor(files, self._hang_timeout_s, self._started_at)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Report lost ranks; kill a group with a hung rank and raise WorkerGroupError, which restarts it."""
        if errors := worker_group_status.errors:
            reason = (str(errors[min(errors)]).strip().splitlines() or ["unknown reason"])[-1][:200]
            self._run.report_event(f"worker {', '.join(map(str, sorted(errors)))} was lost ({reason})")
            return
        if worker_group_status.finished:
            return
        if not self._has_spares and time.monotonic() - self._started_at > SPARE_AFTER_S:
            self._start_spare_processes()
        if overdue := self._heartbeats.overdue_ranks(time.monotonic()):
            states = self._kill_group()
            stopped = sorted(rank for rank in overdue if states.get(rank) == "stopped")
            cause = f"worker {', '.join(map(str, stopped))} is stopped" if stopped else "none of them is stopped"
            text = (
                f"worker {', '.join(map(str, overdue))} made no progress for {self._hang_timeout_s:g} s ({cause}): "
                f"the worker group is killed, its Python stacks are in {self._run.logs}/stacks-worker-*.txt"
            )
            self._run.report_event(text)
            raise WorkerGroupError(text, {rank: TimeoutError(text) for rank in overdue})

    def _start_spare_processes(self) -> None:
        """Start a process for each rank of the next group, on the same node."""
        assert self._start_spares is not None
        self._has_spares = True
        for node, count in Counter(worker.metadata.node_id for worker in self._workers).items():
            self._start_spares(count, node_id=node)

    def _kill_group(self) -> dict[int, str]:
        nodes: dict[str, dict[int, tuple[int, str]]] = {}
        for rank, worker in enumerate(self._workers):
            nodes.setdefault(worker.metadata.node_id, {})[rank] = (worker.metadata.pid, str(self._run.stacks(rank)))
        task = ray.remote(num_cpus=0)(kill_hung_ranks)
        pending = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(ranks)
            for node, ranks in nodes.items()
        ]
        done, _ = ray.wait(pending, num_returns=len(pending), timeout=KILL_TASK_TIMEOUT_S + DUMP_TIMEOUT_S)
        states: dict[int, str] = {}
        for result in done:
            try:
                states |= ray.get(result)
            except ray.exceptions.RayError:  # the node is lost, and its ranks with it
                continue
        return states


class RendezvousBackend(Backend):
    """Ray Train backend that gives each rank the address of rank 0."""

    share_cuda_visible_devices = True  # a rank sees all GPUs of its node, so NCCL can use the links between them

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Open a port on rank 0's node and send its address to all ranks."""
        host, port = worker_group.execute_single(0, open_address)
        worker_group.execute(set_address, host, port)


class RendezvousConfig(BackendConfig):
    """Ray Train's config of the backend."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend class."""
        return RendezvousBackend


def open_address() -> tuple[str, int]:
    """Open a port on this node, rank 0's; return its address and the port."""
    return open_port(ray.util.get_node_ip_address())


def set_address(host: str, port: int) -> None:
    """Store rank 0's address for `join_process_group`."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))


def join_process_group() -> Any:
    """Join the run's process group, with NCCL if Ray gave the rank a GPU, else Gloo."""
    import ray.train
    import torch

    from engine.train.process_group import ProcessGroup

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()), NODE_RANK=str(context.get_node_rank()),
    )  # fmt: skip
    device = torch.device("cpu")
    if torch.cuda.is_available() and ray.get_gpu_ids():
        import ray.train.torch

        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    init_process_group(rank, world_size, address, ray.util.get_node_ip_address(), device.type == "cuda")
    return ProcessGroup(rank, world_size, device)

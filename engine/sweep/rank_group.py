"""The ranks of trials with several workers: Tune's trial process is rank 0, the other ranks are actors that it keeps.

Processes, their imports and their process group are reused from trial to trial. A stopped trial ends on all ranks at once:
after each validation the ranks exchange whether to continue. If a rank is lost, its trial is restarted in other processes:
ranks cannot continue in a collective without it, so rank 0's process exits, and with it its actors.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.sweep.recovery import WorkerLost, write_failure_reason
from engine.sweep.start_weights import start_state_factory
from engine.train.job import TrainJob
from engine.train.loop import Metrics
from engine.train.process_group import ProcessGroup
from engine.train.rendezvous import init_process_group, open_port
from engine.train.run_folder import RunFolder
from engine.train.watchdog import SLOW_FACTOR
from engine.train.worker import train_worker

END_TIMEOUT_S = 60.0  # for the other ranks to end a trial after rank 0
POLL_S = 1.0  # between checks of the other ranks
NOTICE_S = 5.0  # for rank 0 to notice a lost rank itself: by its closed connection, unless the whole node is lost


class TrialStopped(Exception):
    """The trial is to end, on all ranks."""


class RankGroup:
    """All ranks of a trial, as rank 0 sees them."""

    def __init__(self, job: TrainJob, resources: dict[str, float]) -> None:
        """Start the other ranks on the bundles of the trial's placement group, each with `resources`, and join them.

        Raises WorkerLost if one is lost before it has joined.
        """
        self.is_intact = True  # whether all ranks can train another trial
        world_size, placement_group = job.config.train.workers, ray.util.get_current_placement_group()
        actor_class: Any = ray.remote(RankActor)
        assert placement_group is not None
        self._actors = [
            actor_class.options(
                num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group, placement_group_bundle_index=rank
                ),
            ).remote()
            for rank in range(1, world_size)
        ]  # fmt: skip
        node_ids = [actor.node_id.remote() for actor in self._actors]
        raise_first(collect_errors(node_ids, node_ids))
        nodes = [ray.get_runtime_context().get_node_id(), *ray.get(node_ids)]
        local_ranks = [(nodes[:rank].count(node), nodes.count(node)) for rank, node in enumerate(nodes)]
        address = open_port(ray.util.get_node_ip_address())
        timeout_s = job.config.train.hang_timeout_s * SLOW_FACTOR
        joining = [
            actor.join.remote(rank, world_size, address, local_ranks[rank], timeout_s)
            for rank, actor in enumerate(self._actors, 1)
        ]
        with watch_ranks(joining, RunFolder(job.config.run_dir).logs):
            self.group = join_process_group(0, world_size, address, local_ranks[0], timeout_s)
        raise_first(collect_errors(joining, joining))

    def train(self, job: TrainJob, state: list[ray.ObjectRef], report: Callable[[Metrics], None]) -> Metrics:
        """Train on all ranks; return the last metrics. If `report` raises SystemExit, all ranks end, and it is raised.

        Raises WorkerLost if a rank's process is lost, else the error of this rank, else that of another one.
        """
        results = [actor.train.remote(job.to_dict(), state) for actor in self._actors]
        own_error: Exception | None = None
        metrics: Metrics = {}
        try:
            with watch_ranks(results, RunFolder(job.config.run_dir).logs):
                factory = start_state_factory(ray.get(state[0]))
                metrics = train_worker(
                    job, self.group, on_step=self._report_and_sync(job, report), model_factory=factory
                )
        except Exception as error:
            own_error = error
        finally:
            ended, late = ray.wait(results, num_returns=len(results), timeout=END_TIMEOUT_S)
            errors = collect_errors(results, ended)
            lost = [error for error in errors if isinstance(error, WorkerLost)]
            self.is_intact = not (lost or late)
        timed_out = [WorkerLost("one of its workers does not end")] if late else []
        raise_first([*lost, *([own_error] if own_error else []), *errors, *timed_out])
        return metrics

    def _report_and_sync(self, job: TrainJob, report: Callable[[Metrics], None]) -> Callable[[Metrics], None]:
        def on_step(line: Metrics) -> None:
            if not is_stop_point(line, job):
                return
            try:
                report(line)
            except SystemExit:
                self.group.all_reduce_ints(1)
                raise
            self.group.all_reduce_ints(0)

        return on_step


class RankActor:
    """The Ray actor of a rank other than 0."""

    def node_id(self) -> str:
        """Return the id of the actor's node."""
        return str(ray.get_runtime_context().get_node_id())

    def join(self, *args: Any) -> None:
        """Join the process group."""
        self._group = join_process_group(*args)

    def train(self, spec: dict[str, Any], state: list[ray.ObjectRef]) -> None:
        """Train until the end, or until rank 0 says that the trial is stopped."""
        job = TrainJob.from_dict(spec)

        def stop_with_rank_0(line: Metrics) -> None:
            if is_stop_point(line, job) and self._group.all_reduce_ints(0)[0]:
                raise TrialStopped

        try:
            factory = start_state_factory(ray.get(state[0]))
            train_worker(job, self._group, on_step=stop_with_rank_0, model_factory=factory)
        except TrialStopped:
            pass
        finally:
            gc.collect()


def is_stop_point(line: Metrics, job: TrainJob) -> bool:
    """Return whether a trial may be stopped after the step of this line, whose validation has just been reported."""
    return line["step"] < job.config.train.max_steps and any(name.startswith("validation_") for name in line)


def join_process_group(
    rank: int, world_size: int, address: tuple[str, int], local_rank: tuple[int, int], timeout_s: float
) -> ProcessGroup:
    """Join the process group of a trial; `local_rank`: the rank's number among those of its node, and their number."""
    cuda = torch.cuda.is_available()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(local_rank[1]),
        LOCAL_RANK="0" if cuda else str(local_rank[0]),  # a rank sees only the one GPU that Ray gave it
    )  # fmt: skip
    init_process_group(rank, world_size, address, ray.util.get_node_ip_address(), cuda, timedelta(seconds=timeout_s))
    return ProcessGroup(rank, world_size, torch.device("cuda" if cuda else "cpu"))


@contextlib.contextmanager
def watch_ranks(results: Sequence[ray.ObjectRef], logs: Path) -> Iterator[None]:
    """Exit this process, with the reason in `logs`, if another rank fails during the block and this one does not notice.

    This rank would wait for it in a collective, which never ends if a node is lost without closing its connections.
    """
    done = threading.Event()

    def watch() -> None:
        pending = {result: rank for rank, result in enumerate(results, 1)}
        while pending and not done.is_set():
            for result in ray.wait(list(pending), num_returns=1, timeout=POLL_S)[0]:
                error = error_of(result, pending.pop(result))
                if error and not done.wait(NOTICE_S):
                    write_failure_reason(logs, error)
                    os._exit(1)

    threading.Thread(target=watch, name="watch-ranks", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def collect_errors(results: Sequence[ray.ObjectRef], ended: Sequence[ray.ObjectRef]) -> list[Exception]:
    """Return the errors of those ranks other than 0 whose result is in `ended`; waits for these."""
    errors = (error_of(result, rank) for rank, result in enumerate(results, 1) if result in ended)
    return [error for error in errors if error]


def error_of(result: ray.ObjectRef, rank: int) -> Exception | None:
    """Return the error that a rank has raised, WorkerLost if its process is lost, None if it succeeded."""
    try:
        ray.get(result)
    except ray.exceptions.RayActorError:
        return WorkerLost(f"its worker {rank} was lost")
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    return None


def raise_first(errors: Sequence[Exception]) -> None:
    """Raise the first of these errors, if there is one."""
    if errors:
        raise errors[0]

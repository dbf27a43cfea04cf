"""The ranks of trials with several workers: Tune's own process is rank 0, the others are actors beside it that stay warm.

The processes, their imports and their process group go on from trial to trial. A trial that is stopped ends on all ranks at
once: after each validation they tell each other whether to go on. One that has lost a rank is over, and its trial is begun
again by another: a rank that waits for one that is gone cannot go on, so the process of rank 0 ends, and with it its actors.
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

END_TIMEOUT_S = 60.0  # that the other ranks may take to end a trial after rank 0 has
POLL_S = 1.0  # between looks at how the other ranks are
NOTICE_S = (
    5.0  # that rank 0 has to notice by itself that one is gone: its connection is closed, unless a whole node went
)


class TrialStopped(Exception):
    """The trial is to end, on all ranks."""


class RankGroup:
    """All ranks, as rank 0 sees them."""

    def __init__(self, job: TrainJob, resources: dict[str, float]) -> None:
        """Start the other ranks in the bundles of this trial's placement group, each with `resources`, and meet them.

        Raises Lost where one is gone before it has come.
        """
        self.whole = True  # whether all ranks are ready for another trial
        world, here = job.config.train.workers, ray.util.get_current_placement_group()
        actor: Any = ray.remote(RankActor)
        assert here is not None
        self._others = [
            actor.options(
                num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(here, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(1, world)
        ]  # fmt: skip
        asked = [other.node.remote() for other in self._others]
        raise_first(collect_errors(asked, asked))
        nodes = [ray.get_runtime_context().get_node_id(), *ray.get(asked)]
        beside = [(nodes[:rank].count(node), nodes.count(node)) for rank, node in enumerate(nodes)]
        address = open_port(ray.util.get_node_ip_address())
        limit_s = job.config.train.hang_timeout_s * SLOW_FACTOR
        joining = [
            other.join.remote(rank, world, address, beside[rank], limit_s) for rank, other in enumerate(self._others, 1)
        ]
        with watch_ranks(joining, RunFolder(job.config.run_dir).logs):
            self.group = join_process_group(0, world, address, beside[0], limit_s)
        raise_first(collect_errors(joining, joining))

    def work(self, job: TrainJob, state: list[ray.ObjectRef], report: Callable[[Metrics], None]) -> Metrics:
        """Train on all ranks; return the last metrics. Where `report` raises SystemExit, all of them end, and it is raised.

        Raises Lost where the process of a rank is gone, and otherwise what this rank or else another one has raised.
        """
        beside = [other.work.remote(job.to_dict(), state) for other in self._others]
        mine: Exception | None = None
        last: Metrics = {}
        try:
            with watch_ranks(beside, RunFolder(job.config.run_dir).logs):
                last = train_worker(
                    job,
                    self.group,
                    on_step=self._telling(job, report),
                    model_factory=start_state_factory(ray.get(state[0])),
                )
        except Exception as error:
            mine = error
        finally:
            ended, late = ray.wait(beside, num_returns=len(beside), timeout=END_TIMEOUT_S)
            theirs = collect_errors(beside, ended)
            gone = [fault for fault in theirs if isinstance(fault, WorkerLost)]
            self.whole = not (gone or late)
        silent = [WorkerLost("a worker of its does not come to the end")] if late else []
        raise_first([*gone, *([mine] if mine else []), *theirs, *silent])
        return last

    def _telling(self, job: TrainJob, report: Callable[[Metrics], None]) -> Callable[[Metrics], None]:
        def tell(line: Metrics) -> None:
            if not is_stop_point(line, job):
                return
            try:
                report(line)
            except SystemExit:
                self.group.all_reduce_ints(1)
                raise
            self.group.all_reduce_ints(0)

        return tell


class RankActor:
    """One of the other ranks: an actor."""

    def node(self) -> str:
        """Return the node that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def join(self, *place: Any) -> None:
        """Take a place in the process group."""
        self._group = join_process_group(*place)

    def work(self, spec: dict[str, Any], state: list[ray.ObjectRef]) -> None:
        """Train until the end, or until rank 0 says that the trial is stopped."""
        job = TrainJob.from_dict(spec)

        def heed(line: Metrics) -> None:
            if is_stop_point(line, job) and self._group.all_reduce_ints(0)[0]:
                raise TrialStopped

        try:
            train_worker(job, self._group, on_step=heed, model_factory=start_state_factory(ray.get(state[0])))
        except TrialStopped:
            pass
        finally:
            gc.collect()


def is_stop_point(line: Metrics, job: TrainJob) -> bool:
    """Tell whether a trial may be stopped after the step of this line: its validation has just been reported."""
    return line["step"] < job.config.train.max_steps and any(name.startswith("validation_") for name in line)


def join_process_group(
    rank: int, world: int, address: tuple[str, int], beside: tuple[int, int], limit_s: float
) -> ProcessGroup:
    """Join the process group of a team; `beside`: which of the ranks on this node this is, and how many they are."""
    cuda = torch.cuda.is_available()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(beside[1]),
        LOCAL_RANK="0" if cuda else str(beside[0]),  # a rank sees the one GPU that Ray gave it
    )  # fmt: skip
    init_process_group(rank, world, address, ray.util.get_node_ip_address(), cuda, timedelta(seconds=limit_s))
    return ProcessGroup(rank, world, torch.device("cuda" if cuda else "cpu"))


@contextlib.contextmanager
def watch_ranks(beside: Sequence[ray.ObjectRef], logs: Path) -> Iterator[None]:
    """End this process, with the reason in `logs`, if in the block another rank fails and this one does not notice.

    It would wait for it in a collective, which nothing ends where a node is gone without closing its connections.
    """
    over = threading.Event()

    def watch() -> None:
        waiting = {answer: rank for rank, answer in enumerate(beside, 1)}
        while waiting and not over.is_set():
            for answer in ray.wait(list(waiting), num_returns=1, timeout=POLL_S)[0]:
                fault = error_of(answer, waiting.pop(answer))
                if fault and not over.wait(NOTICE_S):
                    write_failure_reason(logs, fault)
                    os._exit(1)

    threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def collect_errors(beside: Sequence[ray.ObjectRef], ended: Sequence[ray.ObjectRef]) -> list[Exception]:
    """Return what went wrong with the other ranks, of those that have ended; waits for these."""
    told = (error_of(answer, rank) for rank, answer in enumerate(beside, 1) if answer in ended)
    return [fault for fault in told if fault]


def error_of(answer: ray.ObjectRef, rank: int) -> Exception | None:
    """Return what a rank has raised, Lost where its process is gone, None where its work is done."""
    try:
        ray.get(answer)
    except ray.exceptions.RayActorError:
        return WorkerLost(f"its worker {rank} was lost")
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    return None


def raise_first(found: Sequence[Exception]) -> None:
    """Raise the first of these, if there is one."""
    if found:
        raise found[0]

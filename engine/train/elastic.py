"""How many workers a run has, where it may have fewer than it wants: Ray Train's elastic policy, made exact and quick.

Ray Train ends the workers of a group that it resizes, so a checkpoint is asked for first and no step is taken twice.
The global batch does not depend on the number of workers, and a checkpoint has no layout: nothing else changes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.config import ScalingConfig

REACH_S = 2.0  # to open a connection to a node
LOOK_S = 0.5  # between looks for room, while no worker runs
ANSWER_S = 10.0  # for Ray to say what the nodes have
SAVE_S = 120.0  # to wait for the checkpoint before a resize

_save_asked = threading.Event()


def ask_for_save() -> None:
    """Ask the rank that runs in this process for a checkpoint at once."""
    _save_asked.set()


def save_requests() -> Callable[[], bool]:
    """Return, on rank 0, what `work` asks in each step: whether a checkpoint was asked for, or a node will be taken away."""
    from ray.train.v2._internal.execution.context import get_train_context

    notices = get_train_context().preemption_context  # `ray.train.get_preemption_info` reads it, but is a barrier
    heeded = None

    def wanted() -> bool:
        nonlocal heeded
        notice, news = notices.preemption_info, False
        if notice != heeded:
            heeded, news = notice, True
        if _save_asked.is_set():
            _save_asked.clear()
            news = True
        return news

    return wanted


class Elastic(ElasticScalingPolicy):  # type: ignore[misc]  # Ray's class has no types
    """From min to max workers, as there is room on the nodes that answer."""

    def __init__(self, scaling: ScalingConfig, checkpoints: Path) -> None:
        """Size a group by `scaling`; its ranks save under `checkpoints`."""
        super().__init__(scaling)
        self._checkpoints = checkpoints
        self._saving: tuple[float, set[str]] | None = None  # since when a save is awaited, and which are older

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as many as there is room for; wait while Ray counts a node that doesn't answer."""
        self._saving = None
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision) or not all_answer():
            time.sleep(LOOK_S)  # the controller asks again at once
            return NoopDecision()
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Resize once a checkpoint that was asked for is in place."""
        if self._saving is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if isinstance(decision, ResizeDecision):
                self._saving = (time.monotonic(), self._saved())
                self._decision = decision
                worker_group_state.workers[0].execute_async(ask_for_save)
            else:
                return decision
        since, before = self._saving
        if not self._saved() - before and time.monotonic() - since < SAVE_S:
            return NoopDecision()
        self._saving = None
        return self._decision

    def _saved(self) -> set[str]:
        return {manifest.parent.name for manifest in self._checkpoints.glob("step-*/manifest.json")}

    def _get_reserved_resources(self) -> Any:
        """Ask Ray for this run's share of the nodes as they are now, not as they were up to 20 seconds ago."""
        try:
            share = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(share, timeout=ANSWER_S)
        except ray.exceptions.RayError:  # it is asked again
            return None


def all_answer() -> bool:
    """Whether all nodes that Ray counts as alive do answer: it takes Ray some time to miss one."""

    def answers(node: dict[str, Any]) -> bool:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), REACH_S).close()
        except OSError:
            return False
        return True

    alive = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(min(64, len(alive))) as pool:
        return all(pool.map(answers, alive))

"""Elastic training: Ray Train's elastic scaling policy, which here saves a checkpoint before it resizes the worker group.

Ray Train restarts the worker group to resize it, so a checkpoint is requested first and no step is repeated. The global
batch does not depend on the number of workers, and checkpoints have no layout, so the loss curve stays the same.
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

CONNECT_TIMEOUT_S = 2.0  # for a connection to a node
POLL_S = 0.5  # between checks for free resources, while no worker runs
RAY_TIMEOUT_S = 10.0  # for an answer of Ray about the nodes' resources
SAVE_TIMEOUT_S = 120.0  # for the checkpoint before a resize

_save_requested = threading.Event()


def request_save() -> None:
    """Request a checkpoint of the rank that runs in this process."""
    _save_requested.set()


def save_request_poller() -> Callable[[], bool]:
    """Return rank 0's `is_save_requested`: whether a checkpoint was requested, or a node will be preempted."""
    from ray.train.v2._internal.execution.context import get_train_context

    preemption = get_train_context().preemption_context  # `ray.train.get_preemption_info` reads it, but is a barrier
    last_notice = None

    def is_save_requested() -> bool:
        nonlocal last_notice
        notice, requested = preemption.preemption_info, False
        if notice != last_notice:
            last_notice, requested = notice, True
        if _save_requested.is_set():
            _save_requested.clear()
            requested = True
        return requested

    return is_save_requested


class ElasticPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray's class has no types
    """Sizes the worker group between min and max workers by the resources of the nodes that can be reached."""

    def __init__(self, scaling: ScalingConfig, checkpoints: Path) -> None:
        """Size the worker group by `scaling`; its ranks save checkpoints under `checkpoints`."""
        super().__init__(scaling)
        self._checkpoints = checkpoints
        self._saving: tuple[float, set[str]] | None = None  # when a save was requested, and the checkpoints before it

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as many workers as fit; wait while Ray counts a node that cannot be reached."""
        self._saving = None
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision) or not all_nodes_reachable():
            time.sleep(POLL_S)  # the controller calls again at once
            return NoopDecision()
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Request a checkpoint before a resize, and resize once it is complete."""
        if self._saving is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if isinstance(decision, ResizeDecision):
                self._saving = (time.monotonic(), self._checkpoint_names())
                self._decision = decision
                worker_group_state.workers[0].execute_async(request_save)
            else:
                return decision
        requested_at, before = self._saving
        if not self._checkpoint_names() - before and time.monotonic() - requested_at < SAVE_TIMEOUT_S:
            return NoopDecision()
        self._saving = None
        return self._decision

    def _checkpoint_names(self) -> set[str]:
        return {manifest.parent.name for manifest in self._checkpoints.glob("step-*/manifest.json")}

    def _get_reserved_resources(self) -> Any:
        """Return the resources reserved for this run, recomputed: Ray's own value may be 20 seconds old."""
        try:
            resources = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(resources, timeout=RAY_TIMEOUT_S)
        except ray.exceptions.RayError:  # the policy is called again
            return None


def all_nodes_reachable() -> bool:
    """Return whether all nodes that Ray counts as alive can be reached: Ray takes some time to notice a lost node."""

    def is_reachable(node: dict[str, Any]) -> bool:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    alive = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(min(64, len(alive))) as pool:
        return all(pool.map(is_reachable, alive))

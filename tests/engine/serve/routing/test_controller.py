"""The controller without a cluster: what it stores, publishes, resumes, and stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.schema import ReplicaState

from engine.serve.routing import controller as module
from engine.serve.routing.controller import Controller, load_state
from engine.serve.routing.messages import Report, ShadowComparison, Version
from engine.serve.routing.rollout import RolloutPlan
from engine.serve.routing.sequential_test import CanaryRules, Outcome

OLD = Version("old", "app-old", "hash-old", "/old", {"min_replicas": 1})
NEW = Version("new", "app-new", "hash-new", "/new", {"min_replicas": 1})
CANARY = RolloutPlan("canary", CanaryRules((0.5, 1.0), 10, 0.0, 0.01), 0.01, 0.2, 1.0, 3, keep_warm_s=0.0)
SHADOW = RolloutPlan("shadow", CANARY.rules, 0.01, 0.2, 1.0, 2, keep_warm_s=0.0)
REPLACE = RolloutPlan("replace", CANARY.rules, 0.01, 0.2, 1.0, 3, keep_warm_s=600.0)


class Cluster:
    """A key-value store, and the Serve applications of a cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: dict[bytes, bytes] = {}
        self.deleted: list[str] = []
        self.running = {"app-old", "app-new"}

    def status(self) -> Any:
        deployment = SimpleNamespace(replica_states={ReplicaState.RUNNING: 1})
        return SimpleNamespace(applications={app: SimpleNamespace(deployments={"d": deployment}) for app in self.running})  # fmt: skip

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in (self.folder / "rollout.jsonl").read_text().splitlines()]

    def run(self, work: Callable[[Controller], Awaitable[None]], versions: dict[str, Any] | None = None) -> None:
        """Run something with a controller that starts, or resumes, on this cluster."""

        async def main() -> None:
            controller = Controller("http://localhost:1", str(self.folder), versions or {})
            async with asyncio.timeout(20):
                await work(controller)

        asyncio.run(main())


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path)
    kv = SimpleNamespace(
        _internal_kv_get=cluster.stored.get, _internal_kv_del=cluster.stored.pop,
        _internal_kv_put=lambda key, value, overwrite: cluster.stored.__setitem__(key, value),
    )  # fmt: skip
    monkeypatch.setattr(module, "internal_kv", kv)
    monkeypatch.setattr(module.serve, "status", cluster.status)
    monkeypatch.setattr(module.serve, "delete", lambda app, _blocking: cluster.deleted.append(app))
    monkeypatch.setattr(module, "UPDATE_PERIOD_S", 0.001)
    monkeypatch.setattr(module, "REPLICA_CHECK_PERIOD_S", 0.001)
    return cluster


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_routers_get_a_table_for_each_change_and_none_otherwise(cluster: Cluster) -> None:
    async def work(controller: Controller) -> None:
        await controller.deploy({"m": OLD}, CANARY)
        table = await controller.report(-1, Report(), 0.0)
        assert table
        assert (table.models["m"].stable, table.models["m"].candidate) == (OLD, None)
        assert await controller.report(table.revision, Report(), 0.01) is None
        waiting = asyncio.ensure_future(controller.report(table.revision, Report(), 10.0))
        await asyncio.sleep(0.01)
        await controller.set_endpoint("http://localhost:2", str(cluster.folder), {"options": {"tries": 2}})
        newer = await waiting
        assert newer
        assert (newer.revision, newer.settings) == (table.revision + 1, {"options": {"tries": 2}})

    cluster.run(work)


def test_failing_canary_is_withdrawn_and_its_replicas_are_stopped(cluster: Cluster) -> None:
    async def work(controller: Controller) -> None:
        await controller.deploy({"m": OLD}, CANARY)
        await controller.deploy({"m": NEW}, CANARY)
        model = controller.state.models["m"]
        while model.rollout:
            outcomes = {"old": [Outcome(False, 1.0)] * 20, "new": [Outcome(True, 0.0)] * 4}
            await controller.report(0, Report(outcomes), 0.0)
            await asyncio.sleep(0.002)
        await until(lambda: cluster.deleted == ["app-new"])
        assert model.stable == OLD

    cluster.run(work)
    assert cluster.events() == ["promoted", "canary", "withdrawn"]


def test_good_canary_is_promoted(cluster: Cluster) -> None:
    async def work(controller: Controller) -> None:
        await controller.deploy({"m": OLD}, CANARY)
        await controller.deploy({"m": NEW}, CANARY)
        await controller.report(0, Report({"new": [Outcome(False, 1.0)] * 10}), 0.0)
        await until(lambda: controller.state.models["m"].stable == NEW)
        await until(lambda: cluster.deleted == ["app-old"])

    cluster.run(work)
    assert cluster.events() == ["promoted", "canary", "promoted"]


def test_killed_controller_resumes(cluster: Cluster) -> None:
    async def first(controller: Controller) -> None:
        await controller.set_endpoint("http://localhost:1", str(cluster.folder), {"options": {}})
        await controller.deploy({"m": OLD}, CANARY)
        await controller.deploy({"m": NEW}, CANARY)
        await controller.report(0, Report({"old": [Outcome(False, 1.0)] * 3, "new": [Outcome(False, 1.0)] * 3}), 0.0)
        await until(lambda: controller.state.models["m"].rollout.stage_requests == 3)  # type: ignore[union-attr]
        controller._store()
        states.append(deepcopy(await controller.get_state()))

    async def second(controller: Controller) -> None:
        states.append(await controller.get_state())

    states: list[Any] = []
    cluster.run(first)
    cluster.run(second)
    assert states[0] == states[1]
    module.delete_state()
    assert load_state() is None


def test_candidate_without_replicas_is_withdrawn(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WITHOUT_REPLICAS_S", 0.05)

    async def work(controller: Controller) -> None:
        await controller.deploy({"m": OLD}, CANARY)
        await controller.deploy({"m": NEW}, CANARY)
        await asyncio.sleep(0.1)
        assert controller.state.models["m"].rollout
        cluster.running.discard("app-new")
        await until(lambda: controller.state.models["m"].rollout is None)

    cluster.run(work)
    assert cluster.events()[-1] == "withdrawn"


def test_shadow_ends_after_its_requests(cluster: Cluster) -> None:
    async def work(controller: Controller) -> None:
        await controller.deploy({"m": OLD}, SHADOW)
        await controller.deploy({"m": NEW}, SHADOW)
        comparison = ShadowComparison(False, True, 0.0, 1.0, 2.0)
        await controller.report(0, Report(comparisons={"new": [comparison] * 2, "other": [comparison]}), 0.0)
        await until(lambda: controller.state.models["m"].rollout is None)
        assert "2 of 2 answers identical" in controller.state.models["m"].events[-2].reason
        assert "2.00 times the latency" in controller.state.models["m"].events[-2].reason

    cluster.run(work)
    assert cluster.events() == ["promoted", "shadow", "compared", "withdrawn"]


def test_rollout_is_stopped_on_request(cluster: Cluster) -> None:
    async def work(controller: Controller) -> None:
        await controller.deploy({"m": OLD}, CANARY)
        assert not await controller.stop_rollout("m", "rolled back")
        await controller.deploy({"m": NEW}, CANARY)
        assert await controller.stop_rollout("m", "rolled back")
        assert not await controller.stop_rollout("other", "rolled back")

    cluster.run(work)
    assert cluster.events() == ["promoted", "canary", "withdrawn"]


def test_redeployed_replicas_are_kept(cluster: Cluster) -> None:
    async def work(controller: Controller) -> None:
        await controller.deploy({"m": OLD}, REPLACE)
        await controller.deploy({"m": NEW}, REPLACE)
        warm_until = controller.state.models["m"].warm_until["app-old"]
        await controller.keep_warm(["app-old"], 1e6)
        assert controller.state.models["m"].warm_until["app-old"] > warm_until

    cluster.run(work)
    assert not cluster.deleted


def test_versions_of_a_serve_config_are_declared_once(cluster: Cluster) -> None:
    async def check(controller: Controller) -> None:
        assert controller.state.models["m"].stable == OLD

    cluster.run(check, {"m": asdict(OLD)})
    cluster.run(check, {"m": asdict(OLD)})
    assert cluster.events() == ["promoted"]

"""The rollout controller: keeps an endpoint's versions and rollouts. There is one, and routers go on while it is away.

Its state is written to the cluster's key-value store (Ray's GCS, where Serve keeps its own) before routers see a change, so
that a controller that was killed resumes where it was. Events are also appended to a file in the run's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.experimental import internal_kv
from ray.serve.schema import ReplicaState

from engine.serve.routing.loopback import bind_to_loopback
from engine.serve.routing.messages import EndpointState, Report, RolloutEvent, RoutingTable, Version
from engine.serve.routing.rollout import RolloutPlan, ServedModel, from_json, to_json, version_from
from engine.serve.routing.sequential_test import Outcome

STATE_KEY = b"manta-endpoint"
UPDATE_PERIOD_S = 0.2
REPLICA_CHECK_PERIOD_S = 2.0  # of a candidate
MAX_WITHOUT_REPLICAS_S = 6.0  # before a candidate is withdrawn
STORE_PERIOD_S = 2.0  # for test statistics; changes are stored at once
EVENTS_FILE = "rollout.jsonl"


@dataclass
class ControllerState:
    """Everything that a controller keeps."""

    endpoint: EndpointState
    revision: int = 0  # number of changes: a router that has this revision is up to date
    models: dict[str, ServedModel] = field(default_factory=dict)

    def table(self) -> RoutingTable:
        """Return what routers follow."""
        models = {name: model.route() for name, model in self.models.items()}
        return RoutingTable(self.revision, models, self.endpoint.settings)


class Controller:
    """Runs as a Serve deployment with one replica. Times are seconds since 1970."""

    def __init__(self, url: str, folder: str, versions: dict[str, dict[str, Any]]) -> None:
        """Take the endpoint's URL, the run's folder, and the initial versions by model, used where no state is stored."""
        bind_to_loopback()
        declared = {name: version["id"] for name, version in versions.items()}
        self.state = load_state() or ControllerState(EndpointState(url, folder))
        self.changed = asyncio.Event()  # set by the next change
        self._stored_at = 0.0
        if (
            self.state.endpoint.declared != declared
        ):  # by a Serve config file, which may name other versions than before
            self.state.endpoint = replace(self.state.endpoint, declared=declared)
            for name, fields in versions.items():
                self._declare(name, version_from(fields))
        self._outcomes: dict[str, list[Outcome]] = defaultdict(list)  # version -> since the last update
        self._ratings: dict[str, list[bool]] = defaultdict(list)
        self._last_alive: dict[str, float] = {}  # app of a candidate -> when it last had a replica
        self._checked_at = 0.0
        self._updating = asyncio.get_running_loop().create_task(self._update_forever())

    def check_health(self) -> None:
        """Raise RuntimeError if rollouts are no longer updated; Serve then restarts the controller."""
        if self._updating.done():
            raise RuntimeError("the controller's update loop has ended")

    async def get_state(self) -> ControllerState:
        """Return the whole state."""
        return self.state

    async def set_endpoint(self, url: str, folder: str, settings: dict[str, Any]) -> None:
        """Set where the endpoint listens, which run changed it last, and the ingress' settings, which routers then follow."""
        changed = settings != self.state.endpoint.settings
        self.state.endpoint = replace(self.state.endpoint, url=url, folder=folder, settings=settings)
        if changed:
            self._next_revision()
        self._store()

    async def deploy(self, versions: dict[str, Version], plan: RolloutPlan) -> None:
        """Roll out versions, by model, whose replicas are ready."""
        events: list[RolloutEvent] = []
        for name, version in versions.items():
            model = self.state.models.get(name)
            if model is None:
                model = self.state.models[name] = ServedModel(name, version)
                events.append(model.log_event(time.time(), "promoted", version, "the first of this name"))
                continue
            num_events = model.num_events
            model.deploy(version, plan, time.time())
            events += model.events_after(num_events)
        self._publish(events)

    async def keep_warm(self, apps: list[str], seconds: float) -> None:
        """Stop no replicas of these applications for some time: they are about to be deployed again."""
        for model in self.state.models.values():
            model.keep_warm(apps, time.time() + seconds)
        self._store()

    async def report(self, known_revision: int, report: Report, wait_s: float) -> RoutingTable | None:
        """Take a router's report, and return the routing table.

        Returns None where the router has the latest revision and nothing changes within `wait_s`.
        """
        for version, outcomes in report.outcomes.items():
            self._outcomes[version] += outcomes
        for version, ratings in report.ratings.items():
            self._ratings[version] += ratings
        for model in self.state.models.values():
            if model.rollout:
                for comparison in report.comparisons.get(model.rollout.version.id, ()):
                    model.rollout.shadow_stats.add(comparison)
        if known_revision == self.state.revision and wait_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), wait_s)
        return None if known_revision == self.state.revision else self.state.table()

    async def stop_rollout(self, name: str, reason: str) -> bool:
        """Withdraw a model's candidate; return False where there is none."""
        model = self.state.models.get(name)
        if model is None or model.rollout is None:
            return False
        model.withdraw(time.time(), reason)
        self._publish(model.events[-1:])
        return True

    def _declare(self, name: str, version: Version) -> None:
        """Serve a version that a Serve config file names; Serve has stopped the ones that it doesn't name."""
        model = self.state.models[name] = ServedModel(name, version)
        self._publish([model.log_event(time.time(), "promoted", version, "declared")])

    async def _update_forever(self) -> None:
        while True:
            await asyncio.sleep(UPDATE_PERIOD_S)
            self._update()
            if time.time() > self._checked_at + REPLICA_CHECK_PERIOD_S:
                self._checked_at = time.time()
                await self._check_replicas()

    def _update(self) -> None:
        """Advance or withdraw candidates by the reports since the last update, and stop replicas that were kept warm."""
        now, outcomes, ratings = time.time(), self._outcomes, self._ratings
        self._outcomes, self._ratings = defaultdict(list), defaultdict(list)
        for model in self.state.models.values():
            num_events = model.num_events
            new = model.rollout.version.id if model.rollout else ""
            stable = model.stable.id
            model.update(outcomes[stable], outcomes[new], ratings[stable], ratings[new], now)
            if events := model.events_after(num_events):
                self._publish(events)
            if expired := model.pop_expired(now):
                self._store()
                for app in expired:
                    serve.delete(app, _blocking=False)
        if now > self._stored_at + STORE_PERIOD_S and any(model.rollout for model in self.state.models.values()):
            self._store()

    async def _check_replicas(self) -> None:
        """Withdraw candidates whose replicas fail again and again."""
        candidates = {model.rollout.version.app: model for model in self.state.models.values() if model.rollout}
        status = await asyncio.to_thread(serve.status) if candidates else None
        self._last_alive = {app: self._last_alive.get(app, time.time()) for app in candidates}
        for app, model in candidates.items():
            application = status.applications.get(app) if status else None
            is_alive = application and any(
                deployment.replica_states.get(ReplicaState.RUNNING) for deployment in application.deployments.values()
            )
            may_be_scaled_to_zero = model.rollout and not model.rollout.version.options["min_replicas"]
            if is_alive or may_be_scaled_to_zero:
                self._last_alive[app] = time.time()
            elif (
                model.rollout
                and model.rollout.version.app == app
                and time.time() > self._last_alive[app] + MAX_WITHOUT_REPLICAS_S
            ):
                model.withdraw(time.time(), f"it had no replica for {MAX_WITHOUT_REPLICAS_S:.0f} s")
                self._publish(model.events[-1:])

    def _publish(self, events: Sequence[RolloutEvent]) -> None:
        """Store a change, tell the routers, and append its events to the file."""
        self._next_revision()
        self._store()
        file = Path(self.state.endpoint.folder) / EVENTS_FILE
        with contextlib.suppress(OSError):  # the folder may be on another node's disk; the state holds the events, too
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as stream:
                stream.writelines(json.dumps(asdict(event)) + "\n" for event in events)

    def _next_revision(self) -> None:
        self.state.revision += 1
        self.changed.set()
        self.changed = asyncio.Event()

    def _store(self) -> None:
        self._stored_at = time.time()
        fields = {
            "revision": self.state.revision, "endpoint": asdict(self.state.endpoint), "models": to_json(self.state.models),
        }  # fmt: skip
        internal_kv._internal_kv_put(STATE_KEY, json.dumps(fields).encode(), overwrite=True)


def load_state() -> ControllerState | None:
    """Return the stored state; None where there is none."""
    stored = internal_kv._internal_kv_get(STATE_KEY)
    if not stored:
        return None
    fields = json.loads(stored)
    return ControllerState(EndpointState(**fields["endpoint"]), fields["revision"], from_json(fields["models"]))


def delete_state() -> None:
    """Delete the stored state: the endpoint was taken down."""
    internal_kv._internal_kv_del(STATE_KEY)

"""Keeps what an endpoint's versions are and how their trials stand; there is one of it, and routers go on without it.

Its state is written to the cluster's own store (Ray's GCS, where Serve keeps its own) before anybody is told of it, so that
a steward that was killed goes on where it was. What happens is also appended to a file in the run's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ray import serve
from ray.experimental import internal_kv
from ray.serve.schema import ReplicaState

from engine.serve.routing.loopback import bind_to_loopback
from engine.serve.routing.rollout import Model, Version, from_plain, plan_from, to_plain
from engine.serve.routing.sequential_test import Answer

KEY = b"manta-endpoint"
LOOK_EVERY_S = 0.2
COUNT_EVERY_S = 2.0  # the replicas of what is tried
WITHOUT_S = 6.0  # that it may be without any
STORE_EVERY_S = 2.0  # evidence; changes at once
EVENTS = "rollout.jsonl"


class Controller:
    """Serve runs one of it. Times are seconds since 1970."""

    def __init__(self, url: str, folder: str, versions: dict[str, dict[str, Any]]) -> None:
        """Take the endpoint's URL, the run's folder, and the versions to begin with by name, where nothing is stored yet."""
        bind_to_loopback()
        self.models: dict[str, Model] = {}
        self.number = 0  # of changes: a router that knows it knows all
        self.news = asyncio.Event()  # of the next change
        self._stored = 0.0
        declared = {name: version["id"] for name, version in versions.items()}
        self.endpoint: dict[str, Any] = {"url": url, "folder": folder, "options": {}, "declared": {}}
        if stored := load():
            self.models, self.number = from_plain(stored["models"]), stored["number"]
            self.endpoint = stored["endpoint"]
        self.file = Path(self.endpoint["folder"]) / EVENTS
        if self.endpoint["declared"] != declared:  # by a Serve config, which may name other versions than it did
            self.endpoint["declared"] = declared
            for name, version in versions.items():
                self._declare(name, Version(**version))
        self._told: dict[str, list[Any]] = defaultdict(list)  # version -> answers since the last look
        self._rated: dict[str, list[bool]] = defaultdict(list)
        self._seen: dict[str, float] = {}  # application on trial -> when it last had a replica
        self._counted = 0.0
        self._watch = asyncio.get_running_loop().create_task(self._look_again_and_again())

    def check_health(self) -> None:
        """Raise if trials would not be looked at any more; Serve then begins anew."""
        if self._watch.done():
            raise RuntimeError("the watch has ended")

    async def about(self) -> dict[str, Any]:
        """Return the endpoint's {"url", "folder", "options"}."""
        return self.endpoint

    async def opened(self, url: str, folder: str, options: dict[str, Any]) -> None:
        """Note where the endpoint listens, which run changed it last, and the settings of its ingress, which goes by them."""
        changed = options != self.endpoint["options"]
        self.endpoint |= {"url": url, "folder": folder, "options": options}
        if changed:
            self._count_up()
        self.file = Path(folder) / EVENTS
        self._store()

    async def take(self, versions: dict[str, dict[str, Any]], plan: dict[str, Any]) -> None:
        """Bring in versions, by name, that are ready to answer, as the plan says."""
        events = []
        for name, told in versions.items():
            model, version = self.models.get(name), Version(**told)
            if model is None:
                events.append(self._first(name, version))
                continue
            before = model.told
            model.begin(version, plan_from(plan), time.time())
            events += model.since(before)
        self._tell(*events)

    async def keep(self, apps: list[str], seconds: float) -> None:
        """Let no replicas of these applications go for a while: somebody is about to bring them in again."""
        for model in self.models.values():
            model.keep(apps, time.time() + seconds)
        self._store()

    async def report(self, known: int, answers: dict[str, list[tuple[bool, float]]], shadows: dict[str, list[dict[str, Any]]], ratings: dict[str, list[bool]], wait_s: float) -> dict[str, Any] | None:  # fmt: skip
        """Take what a router saw, by version: answers (failed, pace), comparisons, ratings (True: bad).

        Returns {"number", "models", "settings"}, or None where the router knows the newest and nothing has changed for `wait_s`.
        """
        for version, found in answers.items():
            self._told[version] += [Answer(failed, pace) for failed, pace in found]
        for version, bad in ratings.items():
            self._rated[version] += bad
        for model in self.models.values():
            if model.trial and (seen := shadows.get(model.trial.version.id)):
                for it in seen:
                    self._compare(model, it)
        if known == self.number and wait_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), wait_s)
        return None if known == self.number else self._table()

    async def state(self) -> dict[str, Any]:
        """Return everything, for those who ask how a trial goes."""
        return {"number": self.number, "endpoint": self.endpoint, "models": to_plain(self.models)}

    async def stop_trial(self, name: str, reason: str) -> bool:
        """Withdraw what is tried under a name; False where nothing is."""
        model = self.models.get(name)
        if model is None or model.trial is None:
            return False
        model.withdraw(time.time(), reason)
        self._tell(model.events[-1])
        return True

    def _declare(self, name: str, version: Version) -> None:
        """Let a version answer that a Serve config names; Serve has ended those that it doesn't name."""
        model = self.models[name] = Model(name, version)
        self._tell(model.tell(time.time(), "promoted", version, "declared"))

    def _first(self, name: str, version: Version) -> dict[str, Any]:
        self.models[name] = Model(name, version)
        return self.models[name].tell(time.time(), "promoted", version, "the first of this name")

    def _compare(self, model: Model, seen: dict[str, Any]) -> None:
        assert model.trial
        agreement = model.trial.agreement
        agreement.copied += 1
        agreement.failed += seen["failed"]
        if seen["alike"] is not None:
            agreement.compared += 1
            agreement.alike += seen["alike"]
        if seen["distance"] is not None:
            agreement.distances.append(seen["distance"])
        if not seen["failed"]:
            agreement.paces.append((seen["old"], seen["new"]))

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._look()
            if time.time() > self._counted + COUNT_EVERY_S:
                self._counted = time.time()
                await self._count()

    async def _count(self) -> None:
        """Withdraw what is tried where its replicas end again and again."""
        tried = {model.trial.version.app: model for model in self.models.values() if model.trial}
        status = await asyncio.to_thread(serve.status) if tried else None
        self._seen = {app: self._seen.get(app, time.time()) for app in tried}
        for app, model in tried.items():
            found = status.applications.get(app) if status else None
            alive = found and any(it.replica_states.get(ReplicaState.RUNNING) for it in found.deployments.values())
            idle = model.trial and not model.trial.version.options["min_replicas"]
            if alive or idle:
                self._seen[app] = time.time()
            elif model.trial and model.trial.version.app == app and time.time() > self._seen[app] + WITHOUT_S:
                model.withdraw(time.time(), f"no replica of it was left for {WITHOUT_S:.0f} s")
                self._tell(model.events[-1])

    def _look(self) -> None:
        """Judge what is tried by what came in since the last look, and let go of what is kept no longer."""
        now, told, rated = time.time(), self._told, self._rated
        self._told, self._rated = defaultdict(list), defaultdict(list)
        for model in self.models.values():
            before = model.told
            new = model.trial.version.id if model.trial else ""
            old = model.stable.id
            model.judge(told[old], told[new], rated[old], rated[new], now)
            if events := model.since(before):
                self._tell(*events)
            if gone := model.expired(now):
                self._store()
                for app in gone:
                    serve.delete(app, _blocking=False)
        if now > self._stored + STORE_EVERY_S and any(model.trial for model in self.models.values()):
            self._store()

    def _tell(self, *events: dict[str, Any]) -> None:
        """Write events down, and let the routers know."""
        self._count_up()
        self._store()
        with contextlib.suppress(OSError):  # another node's disk, perhaps: the state has the events too
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.writelines(json.dumps(event) + "\n" for event in events)

    def _count_up(self) -> None:
        self.number += 1
        self.news.set()
        self.news = asyncio.Event()

    def _store(self) -> None:
        self._stored = time.time()
        plain = {"number": self.number, "endpoint": self.endpoint, "models": to_plain(self.models)}
        internal_kv._internal_kv_put(KEY, json.dumps(plain).encode(), overwrite=True)

    def _table(self) -> dict[str, Any]:
        models = {name: model.table() for name, model in self.models.items()}
        return {"number": self.number, "models": models, "settings": self.endpoint["options"]}


def load() -> dict[str, Any] | None:
    """Return the stored state; None where there is none."""
    stored = internal_kv._internal_kv_get(KEY)
    return json.loads(stored) if stored else None


def forget() -> None:
    """Remove the stored state: the endpoint was taken down."""
    internal_kv._internal_kv_del(KEY)

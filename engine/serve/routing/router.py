"""The ingress' way to the replicas: which version answers a request, again where one was lost, and what became of it.

A `Router` stands for the handles of all models: `router[name].method.remote(...)` goes to the version that the present
request's key falls to. A request that a lost replica had taken is asked again of another, as long as its client has got
nothing of the answer; one that a version on trial fails is asked again of the version that it is tried against, so that a
bad one harms nobody. The trial's version is charged with it all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from engine.serve.routing.autoscaling import max_ongoing_requests
from engine.serve.routing.controller import load
from engine.serve.routing.ipc import IpcClientPool, IpcConnection
from engine.serve.routing.rollout import chosen, from_plain, likeness, position
from engine.serve.tracing import Trace

REPORT_EVERY_S = 0.2  # while something is tried
WAIT_S = 2.0  # for news otherwise
LOOK_EVERY_S = 2.0  # for replicas that came or went
ASK_S = 5.0  # for what a replica says of itself
MOST_TOLD = 20_000  # answers of a version that wait to be reported, while the steward is away
SHADOWS = 16  # copies under way at once: more are left out, so that copying never slows what clients wait for
PAUSE_S = 0.1  # before the second try; twice that before each further one

Version = dict[str, Any]
T = TypeVar("T")


@dataclass
class Asked:
    """One client's request: by its key it falls to a version of each model, and stays with it."""

    key: str
    trace: Trace | None = None  # that replicas go on with
    fallen: dict[str, Version] = field(default_factory=dict)


class Withdrawn(Exception):
    """The version that was to answer is tried no longer."""


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


class Router:
    """The models behind an ingress; it follows the steward's table, and goes on by the last one while it is away."""

    def __init__(self, steward: str, settings: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> None:
        """Take the steward's application, the ingress' settings, and what to call with new ones."""
        self.steward, self.settings, self.change = serve.get_app_handle(steward), settings, change
        self.number = -1
        self.informed = asyncio.Event()  # once there is a table
        self.models: dict[str, dict[str, Any]] = {}
        self.handles: dict[str, Any] = {}
        self.abouts: dict[str, dict[str, Any]] = {}
        self._answers: dict[str, list[tuple[bool, float]]] = defaultdict(list)
        self._shadows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._ratings: dict[str, list[bool]] = defaultdict(list)
        self._gone: dict[str, asyncio.Event] = {}  # of versions that requests wait for
        self._copies: set[asyncio.Task[None]] = set()
        self.lanes, self.node = IpcClientPool(), ray.get_runtime_context().get_node_id()
        self._following = [
            asyncio.get_running_loop().create_task(it) for it in (self._follow(), self._follow_replicas())
        ]

    @property
    def tries(self) -> int:
        """How often a request is given to replicas that are lost."""
        return int(self.settings["options"]["tries"])

    def begin(self, key: str, trace: Trace | None = None) -> None:
        """Say whose request the present task answers, and which trace it belongs to."""
        _asked.set(Asked(key, trace))

    def version(self, name: str) -> Version:
        """Return the version of a model that the present request falls to."""
        asked = _asked.get()
        if asked is None:
            stable: Version = self.models[name]["stable"]
            return stable
        if name not in asked.fallen:
            asked.fallen[name] = chosen(self.models[name], asked.key)
        return asked.fallen[name]

    def about(self, name: str) -> dict[str, Any] | None:
        """Return what the version that the present request falls to says of itself; None while it hasn't been asked."""
        version = self.version(name)
        return version["about"] or self.abouts.get(version["id"])

    async def ask(self, name: str) -> None:
        """Ask a replica of the model what it is. Raises TimeoutError while none answers; one scaled to none isn't waked."""
        version = self.models[name]["stable"]
        if version["options"]["min_replicas"] or not (version["about"] or version["id"] in self.abouts):
            found = await asyncio.wait_for(self.handles[version["app"]].describe.remote(), ASK_S)
            self.abouts[version["id"]] = found

    def standing(self, name: str) -> dict[str, Any]:
        """Return {"version", "trial", "events"} of a model: what answers, what is tried, and what happened of late."""
        model = self.models[name]
        trial = model["trial"]
        tried = trial and {"version": trial["version"]["id"], "hash": trial["version"]["hash"], "share": trial["share"], "copied": trial["copied"]}  # fmt: skip
        return {"version": model["stable"]["id"], "trial": tried, "events": model["events"]}

    def rated(self, name: str, bundle: str, bad: bool) -> None:
        """Count a rating of an answer of the version whose bundle's hash begins with `bundle`."""
        if model := self.models.get(name):
            for version in (model["stable"], *([model["trial"]["version"]] if model["trial"] else [])):
                if bundle and version["hash"].startswith(bundle.partition(":")[0]):  # after it comes an adapter
                    self._ratings[version["id"]].append(bad)

    async def of_each_replica(self, name: str, method: str, timeout_s: float) -> list[Any]:
        """Ask all replicas of all versions of a model; an error stands for the answer of one that has none."""
        model = self.models[name]
        versions = [model["stable"], *([model["trial"]["version"]] if model["trial"] else [])]
        asked = [self.handles[it["app"]].broadcast(method) for it in versions]
        found = await asyncio.gather(*(it.results_async(timeout_s=timeout_s, return_exceptions=True) for it in asked))
        return [answer for answers in found for answer in answers]

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def __getitem__(self, name: str) -> Way:
        return Way(self, name)

    async def whole(self, name: str, method: str, args: tuple[Any, ...]) -> Any:
        """Have a replica answer, another one where it is lost."""
        version, began = self.version(name), time.perf_counter()
        try:
            answer = await self.unless_withdrawn(version, name, self._tried(version, method, args))
            failed = is_failure(answer)
        except BackPressureError:
            other = self.fall_back(name, version)
            if other is None:
                raise
        except Exception:
            self.saw(version, True, 0.0)
            other = self.fall_back(name, version)
            if other is None:
                raise
        else:
            pace = (time.perf_counter() - began) / units(answer)
            self.saw(version, failed, pace)
            other = self.fall_back(name, version) if failed else None
            if other is None:
                self.copy(name, method, args, answer, pace)
                return answer
        return await self._tried(other, method, args)  # counted for nobody: it is no request of the other's own

    async def _tried(self, version: Version, method: str, args: tuple[Any, ...]) -> Any:
        tries = self.tries
        for left in reversed(range(tries)):
            try:
                if lane := self.lane(version):
                    return await lane.call(method, args, _trace())
                answer = getattr(self.handles[version["app"]], method).remote(*args, **_trace())
                try:
                    return await answer
                except asyncio.CancelledError:
                    answer.cancel()
                    raise
            except RayActorError:
                if not left:
                    raise
                await asyncio.sleep(PAUSE_S * 2 ** (tries - left - 1))
        raise AssertionError

    def lane(self, version: Version) -> IpcConnection | None:
        """Return a lane to the version's replica with the least to do; None where Serve's handle is to find one."""
        ingresses = self.settings["options"]["ingresses"]
        return self.lanes.least_loaded(
            version["app"], math.ceil(max_ongoing_requests(version["options"]["max_num_seqs"]) / ingresses)
        )

    async def unless_withdrawn(self, version: Version, name: str, answer: Awaitable[Any]) -> Any:
        """Wait for an answer; of a version on trial, as long as it is. Raises Withdrawn: its replicas may be gone for good."""
        if version["id"] == self.models[name]["stable"]["id"]:
            return await answer
        asked = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(self._gone.setdefault(version["id"], asyncio.Event()).wait())
        try:
            await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise Withdrawn
            return asked.result()
        finally:
            asked.cancel()
            gone.cancel()

    def fall_back(self, name: str, version: Version) -> Version | None:
        """Let the present request fall to the version that answers; None where it is that one already."""
        stable: Version = self.models[name]["stable"]
        if version["id"] == stable["id"]:
            return None
        if asked := _asked.get():
            asked.fallen[name] = stable
        return stable

    def saw(self, version: Version, failed: bool, pace: float) -> None:
        """Note what became of a request: `pace` in seconds a token written, or a text."""
        seen = self._answers[version["id"]]
        if len(seen) < MOST_TOLD:
            seen.append((failed, pace))

    def copy(self, name: str, method: str, args: tuple[Any, ...], answer: Any, pace: float) -> None:
        """Ask a shadow the same, if there is one and this request is among those that it is to see."""
        trial, asked = self.models[name]["trial"], _asked.get()
        if not trial or not trial["copied"] or len(self._copies) >= SHADOWS or method == "describe":
            return
        if position(f"copy/{trial['version']['id']}", asked.key if asked else "") >= trial["copied"]:
            return
        task = asyncio.get_running_loop().create_task(self._copied(trial["version"], method, args, answer, pace))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copied(self, version: Version, method: str, args: tuple[Any, ...], answer: Any, pace: float) -> None:
        began = time.perf_counter()
        seen: dict[str, Any] = {"failed": True, "alike": None, "distance": None, "old": pace, "new": 0.0}
        with contextlib.suppress(Exception):  # whatever it is, the shadow has failed
            other = await self._tried(version, method, args)
            if not is_failure(other):
                seen |= {"failed": False, "new": (time.perf_counter() - began) / units(other)}
                if is_repeatable(method, args):
                    alike, distance = likeness(said(answer), said(other))
                    seen |= {"alike": alike, "distance": distance if distance == distance else None}
        self._shadows[version["id"]].append(seen)

    async def _follow(self) -> None:
        """Tell the steward what was seen and take its table, for ever."""
        if stored := load():
            models = {name: model.table() for name, model in from_plain(stored["models"]).items()}
            with contextlib.suppress(Exception):  # an application that is gone: the steward's table will tell
                await self._adopt(
                    {"number": stored["number"], "models": models, "settings": stored["endpoint"]["options"]}
                )
        while True:
            answers, shadows, ratings = self._answers, self._shadows, self._ratings
            self._answers, self._shadows, self._ratings = defaultdict(list), defaultdict(list), defaultdict(list)
            try:
                wait_s = 0.0 if any(model["trial"] for model in self.models.values()) else WAIT_S
                told = self.steward.report.remote(self.number, dict(answers), dict(shadows), dict(ratings), wait_s)
                if table := await asyncio.wait_for(told, 10 * ASK_S):
                    await self._adopt(table)
            except Exception:  # the steward was lost and comes back: what was seen is told then
                _put_back(answers, self._answers)
                _put_back(shadows, self._shadows)
                _put_back(ratings, self._ratings)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _follow_replicas(self) -> None:
        """Keep lanes to the replicas that there are, for ever."""
        while True:
            self.lanes.remove(self.lanes.apps - self._apps())
            await asyncio.gather(*(self._look(app) for app in self._apps() & self.handles.keys()))
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, app: str) -> None:
        with contextlib.suppress(Exception):  # none is there, or Serve is away: lanes that there are go on
            asked = self.handles[app].broadcast("ipc_address").results_async(timeout_s=ASK_S, return_exceptions=True)
            await self.lanes.update(app, await asyncio.wait_for(asked, 2 * ASK_S), self.node)

    def _apps(self) -> set[str]:
        """Return the applications of all versions that may be asked."""
        found = [version for model in self.models.values() for version in (model["stable"], (model["trial"] or {}).get("version"))]  # fmt: skip
        return {version["app"] for version in found if version}

    async def _adopt(self, table: dict[str, Any]) -> None:
        """Go by a new table, once there is a handle for each version in it."""
        apps = set()
        for model in table["models"].values():
            apps |= {model["stable"]["app"], *([model["trial"]["version"]["app"]] if model["trial"] else [])}
        for app in apps - self.handles.keys():
            self.handles[app] = await asyncio.to_thread(serve.get_app_handle, app)
        if table["settings"] not in ({}, self.settings):
            self.settings = table["settings"]
            self.change(self.settings)
        self.models, self.number = table["models"], table["number"]
        self.informed.set()
        there = {version["id"] for model in self.models.values() for version in (model["stable"], (model["trial"] or {}).get("version")) if version}  # fmt: skip
        for version in self._gone.keys() - there:
            self._gone.pop(version).set()


def _trace() -> dict[str, Trace]:
    """Return the present request's trace as what a replica is told beside its job; nothing where there is none."""
    asked = _asked.get()
    return {"trace": asked.trace} if asked and asked.trace else {}


def _put_back(lost: dict[str, list[T]], kept: dict[str, list[T]]) -> None:
    for version, found in lost.items():
        kept[version] = [*found, *kept[version]][-MOST_TOLD:]


@dataclass(frozen=True)
class Way:
    """A model as an ingress asks it, in the manner of Serve's handles."""

    router: Router
    name: str
    streams: bool = False

    def options(self, stream: bool) -> Way:
        """Return the way to methods that stream."""
        return Way(self.router, self.name, stream)

    def __getattr__(self, method: str) -> Call:
        if method.startswith("_"):
            raise AttributeError(method)
        return Call(self, method)


@dataclass(frozen=True)
class Call:
    """One method of a model."""

    way: Way
    method: str

    def remote(self, *args: Any) -> Any:
        """Ask it: an awaitable answer, or a `Stream`."""
        if self.way.streams:
            return Stream(self.way.router, self.way.name, self.method, args)
        return answered(self.way.router.whole(self.way.name, self.method, args))


def answered(answer: Awaitable[Any]) -> Awaitable[Any]:
    """Begin to answer at once, as Serve's handles do, so that several are asked side by side."""
    return asyncio.ensure_future(answer)


class Stream:
    """A replica's messages; until the client has got something of it, another replica can begin anew."""

    def __init__(self, router: Router, name: str, method: str, args: tuple[Any, ...]) -> None:
        self.router, self.name, self.method, self.args = router, name, method, args
        self.version, self.began = router.version(name), time.perf_counter()
        self.tries_left = router.tries - 1
        self.headed = False
        self.choices: dict[int, dict[str, Any]] = {}
        self.over = False
        self.inner = self._begin()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """Return the next message, of whichever replica."""
        while True:
            try:
                coming = anext(self.inner)
                message: dict[str, Any] = await (coming if self.choices else self.router.unless_withdrawn(self.version, self.name, coming))  # fmt: skip
            except StopAsyncIteration:
                self._end(False)
                raise
            except asyncio.CancelledError:
                self.cancel()
                raise
            except BackPressureError:
                if self.headed or not self._other():
                    raise
                continue
            except Exception as error:
                if not await self._again(error):
                    self._end(True)
                    raise
                continue
            if is_failure(message):
                if not self.choices and self._failed_over():
                    continue
                self._end(True)
            if "head" in message:
                if self.headed:
                    continue  # of a second try
                self.headed = True
            for event in message.get("events", ()):
                self._gather(event)
            return message

    def cancel(self) -> None:
        """The client has hung up."""
        self.over = True
        self.inner.cancel()

    def _begin(self) -> Any:
        if lane := self.router.lane(self.version):
            return lane.stream(self.method, self.args, _trace())
        handle = self.router.handles[self.version["app"]]
        return getattr(handle.options(stream=True), self.method).remote(*self.args, **_trace())

    async def _again(self, error: Exception) -> bool:
        """Begin anew where nothing was given out and it can help."""
        if self.choices:
            return False
        if isinstance(error, RayActorError) and self.tries_left > 0:
            self.tries_left -= 1
            await asyncio.sleep(PAUSE_S * 2 ** (self.router.tries - 2 - self.tries_left))
            self.inner = self._begin()
            return True
        return self._failed_over()

    def _failed_over(self) -> bool:
        """Charge a trial's version with a failure, and begin anew with the one that answers; False: it is that one."""
        version = self.version
        if not self._other():
            return False
        self.router.saw(version, True, 0.0)
        return True

    def _other(self) -> bool:
        stable = self.router.fall_back(self.name, self.version)
        if stable is None:
            return False
        self.version, self.began = stable, time.perf_counter()
        self.inner = self._begin()
        return True

    def _gather(self, event: dict[str, Any]) -> None:
        choice = self.choices.setdefault(event["index"], {"index": event["index"], "text": "", "tokens": 0, "reason": None})  # fmt: skip
        choice |= {"text": choice["text"] + event["text"], "tokens": event["tokens"], "reason": event["reason"]}

    def _end(self, failed: bool) -> None:
        if self.over:
            return
        self.over = True
        answer = {"choices": [self.choices[index] for index in sorted(self.choices)]}
        pace = (time.perf_counter() - self.began) / units(answer)
        self.router.saw(self.version, failed, pace)
        if not failed:
            job = self.args[0] | {"stream": False}
            self.router.copy(self.name, "complete", (job,), answer, pace)


def is_failure(answer: Any) -> bool:
    """Tell whether a replica's answer says that it could not, for a reason of its own."""
    return isinstance(answer, dict) and "error" in answer and answer["status"] >= 500


def units(answer: Any) -> int:
    """Return what an answer's time is divided by: tokens written, or texts."""
    if isinstance(answer, dict):
        return max(sum(choice["tokens"] for choice in answer.get("choices", ())), 1)
    return max(len(answer), 1) if isinstance(answer, list) else 1


def is_repeatable(method: str, args: tuple[Any, ...]) -> bool:
    """Tell whether the same model would answer the same again: all but texts that are drawn without a seed."""
    if method == "transcribe":
        return bool(args[1]["temperature"] == 0)
    if method != "complete":
        return True
    job = args[0]
    return job["sampling"]["temperature"] == 0 or job["seed"] is not None


def said(answer: Any) -> Any:
    """Return of an answer what is compared: a completion's texts, everything of the others."""
    if isinstance(answer, dict) and "choices" in answer:
        return [{"text": choice["text"], "reason": choice["reason"]} for choice in answer["choices"]]
    return answer

"""Routes the requests of an ingress: which version of a model answers each, and what the controller learns of it.

A request that a lost replica had taken is retried on another one, as long as its client has received nothing of the answer; one
that a candidate version fails is retried on the stable version, so that a bad candidate harms nobody. The failure counts
against the candidate all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from engine.serve.jobs import (
    Choice,
    Failure,
    GenerationJob,
    GenerationResult,
    Job,
    ModelInfo,
    PromptInfo,
    Result,
    StreamChunk,
    StreamMessage,
)
from engine.serve.routing.controller import load_state
from engine.serve.routing.messages import ModelRoute, RoutingTable, ShadowComparison, Version
from engine.serve.routing.replica_client import RETRY_DELAY_S, ReplicaClient
from engine.serve.routing.reporting import Reporter
from engine.serve.routing.rollout import choose_version, compare_answers, hash_fraction
from engine.serve.routing.sequential_test import Outcome
from engine.serve.tracing import TraceHeaders

REPORT_PERIOD_S = 0.2  # during a rollout
TABLE_WAIT_S = 2.0  # for a new routing table, otherwise
REPORT_TIMEOUT_S = 50.0
DISCOVERY_PERIOD_S = 2.0  # between two looks for new and lost replicas
MAX_SHADOW_REQUESTS = 16  # in flight; further ones are dropped, so that clients never wait for copies

T = TypeVar("T")


@dataclass
class RoutedRequest:
    """A client's request. Its key assigns it to a version of each model, and it stays there."""

    key: str
    trace: TraceHeaders | None = None  # that replicas continue
    versions: dict[str, Version] = field(default_factory=dict)  # by model


class VersionWithdrawn(Exception):
    """The candidate that a request waited for was withdrawn."""


_current_request: ContextVar[RoutedRequest | None] = ContextVar("current_request", default=None)


class Router:
    """The models behind an ingress; follows the controller's routing table, and keeps the last one while it is away."""

    def __init__(
        self,
        controller: Any,
        settings: dict[str, Any],
        on_settings_change: Callable[[dict[str, Any]], None],
        replicas: ReplicaClient,
    ) -> None:
        """Take the controller's handle, the ingress' {"options", "access"}, what to call with new ones, and the replicas."""
        self.controller, self.replicas = controller, replicas
        self.settings, self.on_settings_change = settings, on_settings_change
        self.revision = -1
        self.table_received = asyncio.Event()  # set by the first routing table
        self.models: dict[str, ModelRoute] = {}
        self.reporter = Reporter()
        self._infos: dict[str, ModelInfo] = {}  # by version, where the controller does not know it
        self._withdrawn: dict[str, asyncio.Event] = {}  # by version that requests wait for
        self._background: set[asyncio.Task[None]] = set()  # asyncio keeps no strong references to tasks
        self._shadow_requests: set[asyncio.Task[None]] = set()

    @classmethod
    def connect(
        cls, controller_app: str, settings: dict[str, Any], on_settings_change: Callable[[dict[str, Any]], None]
    ) -> Router:
        """Return a router that follows the controller and the replicas of this Ray cluster."""
        replicas = ReplicaClient(settings["options"]["tries"], settings["options"]["ingresses"])
        router = cls(serve.get_app_handle(controller_app), settings, on_settings_change, replicas)
        for work in (router.follow_controller(), router.follow_replicas()):
            router._background.add(asyncio.get_running_loop().create_task(work))
        return router

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the models."""
        return iter(self.models)

    def begin_request(self, key: str, trace: TraceHeaders | None = None) -> None:
        """Set the key and the trace of the request that the present asyncio task answers."""
        _current_request.set(RoutedRequest(key, trace))

    def version(self, name: str) -> Version:
        """Return the version of a model that answers the present request."""
        request = _current_request.get()
        if request is None:
            return self.models[name].stable
        if name not in request.versions:
            request.versions[name] = choose_version(self.models[name], request.key)
        return request.versions[name]

    def model_info(self, name: str) -> ModelInfo | None:
        """Return what the version that answers the present request can do; None while no replica was asked."""
        version = self.version(name)
        return version.info or self._infos.get(version.id)

    async def fetch_model_info(self, name: str) -> None:
        """Ask a replica of the stable version what it can do. Raises TimeoutError while none answers.

        A version that may be scaled to zero is asked only if its answer is unknown: a request would start a replica.
        """
        version = self.models[name].stable
        if version.options["min_replicas"] or not (version.info or version.id in self._infos):
            self._infos[version.id] = await self.replicas.describe(version)

    def status(self, name: str) -> dict[str, Any]:
        """Return a model's {"version", "trial", "events"} as /v1/models shows them: stable version, candidate, latest events."""
        route = self.models[name]
        candidate = route.candidate and {
            "version": route.candidate.version.id, "hash": route.candidate.version.hash,
            "share": route.candidate.traffic_share, "copied": route.candidate.shadow_share,
        }  # fmt: skip
        return {"version": route.stable.id, "trial": candidate, "events": [asdict(event) for event in route.events]}

    def record_rating(self, name: str, version_hash: str, is_bad: bool) -> None:
        """Count a rating of an answer by the version whose bundle's hash begins with `version_hash`, up to a colon."""
        if route := self.models.get(name):
            for version in route.versions:
                if version_hash and version.hash.startswith(version_hash.partition(":")[0]):  # an adapter follows
                    self.reporter.add_rating(version.id, is_bad)

    async def broadcast(self, name: str, method: str, timeout_s: float) -> list[Any]:
        """Call a method of all replicas of all versions of a model; errors are returned in place of results."""
        versions = self.models[name].versions
        results = await asyncio.gather(
            *(self.replicas.broadcast(version.app, method, timeout_s) for version in versions)
        )
        return [result for of_version in results for result in of_version]

    async def call(self, name: str, method: str, job: Job) -> Any:
        """Have a replica do a job: its Result, or a Failure. A candidate that fails is covered for by the stable version."""
        version, started = self.version(name), time.perf_counter()
        try:
            result = await self.unless_withdrawn(
                name, version, self.replicas.call(version, method, job, current_trace())
            )
        except BackPressureError:  # not the version's fault
            fallback = self.fall_back(name, version)
            if fallback is None:
                raise
        except Exception:
            self.reporter.add_outcome(version.id, Outcome(True, 0.0))
            fallback = self.fall_back(name, version)
            if fallback is None:
                raise
        else:
            failed, latency_s = is_server_error(result), (time.perf_counter() - started) / num_units(result)
            self.reporter.add_outcome(version.id, Outcome(failed, latency_s))
            fallback = self.fall_back(name, version) if failed else None
            if fallback is None:
                self.copy_to_shadow(name, method, job, result, latency_s)
                return result
        # Not counted for the stable version: it was not assigned this request.
        return await self.replicas.call(fallback, method, job, current_trace())

    def stream(self, name: str, job: GenerationJob) -> RoutedStream:
        """Have a replica generate text; iterate over its messages."""
        return RoutedStream(self, name, job)

    async def unless_withdrawn(self, name: str, version: Version, result: Awaitable[T]) -> T:
        """Await a version's result. Raises VersionWithdrawn where a candidate is withdrawn first: its replicas may be gone."""
        if version.id == self.models[name].stable.id:
            return await result
        pending = asyncio.ensure_future(result)
        withdrawn = asyncio.ensure_future(self._withdrawn.setdefault(version.id, asyncio.Event()).wait())
        try:
            await asyncio.wait({pending, withdrawn}, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                raise VersionWithdrawn
            return pending.result()
        finally:
            pending.cancel()
            withdrawn.cancel()

    def fall_back(self, name: str, version: Version) -> Version | None:
        """Assign the present request to the stable version and return it; None where it is assigned to it already."""
        stable = self.models[name].stable
        if version.id == stable.id:
            return None
        if request := _current_request.get():
            request.versions[name] = stable
        return stable

    def copy_to_shadow(self, name: str, method: str, job: Job, result: Result | Failure, latency_s: float) -> None:
        """Give a job to the shadow version, if there is one and the present request is in its share, and compare the results."""
        candidate, request = self.models[name].candidate, _current_request.get()
        if not candidate or not candidate.shadow_share or len(self._shadow_requests) >= MAX_SHADOW_REQUESTS:
            return
        if hash_fraction(f"copy/{candidate.version.id}", request.key if request else "") >= candidate.shadow_share:
            return
        work = self._compare_with_shadow(candidate.version, method, job, result, latency_s)
        task = asyncio.get_running_loop().create_task(work)
        self._shadow_requests.add(task)
        task.add_done_callback(self._shadow_requests.discard)

    async def _compare_with_shadow(
        self, version: Version, method: str, job: Job, result: Result | Failure, latency_s: float
    ) -> None:
        started = time.perf_counter()
        comparison = ShadowComparison(failed=True, stable_latency_s=latency_s)
        with contextlib.suppress(Exception):  # whichever error: the shadow has failed
            shadow_result = await self.replicas.call(version, method, job, current_trace())
            if not is_server_error(shadow_result):
                shadow_latency_s = (time.perf_counter() - started) / num_units(shadow_result)
                comparison = replace(comparison, failed=False, shadow_latency_s=shadow_latency_s)
                if job.is_deterministic:
                    identical, difference = compare_answers(comparable(result), comparable(shadow_result))
                    is_number = difference == difference
                    comparison = replace(
                        comparison, identical=identical, max_difference=difference if is_number else None
                    )
        self.reporter.add_comparison(version.id, comparison)

    async def follow_controller(self) -> None:
        """Report to the controller and adopt its routing tables, forever."""
        if state := load_state():
            with contextlib.suppress(Exception):  # an application is gone: the controller will send a newer table
                await self.adopt(state.table())
        while True:
            report = self.reporter.take()
            try:
                wait_s = 0.0 if any(route.candidate for route in self.models.values()) else TABLE_WAIT_S
                response = self.controller.report.remote(self.revision, report, wait_s)
                if table := await asyncio.wait_for(response, REPORT_TIMEOUT_S):
                    await self.adopt(table)
            except Exception:  # the controller was lost and will be restarted: it gets this report then
                self.reporter.put_back(report)
            await asyncio.sleep(REPORT_PERIOD_S)

    async def follow_replicas(self) -> None:
        """Keep connections to the present replicas, forever."""
        while True:
            await self.replicas.discover({version.app for route in self.models.values() for version in route.versions})
            await asyncio.sleep(DISCOVERY_PERIOD_S)

    async def adopt(self, table: RoutingTable) -> None:
        """Follow a new routing table, once there is a handle for each version in it."""
        versions = [version for route in table.models.values() for version in route.versions]
        await self.replicas.add_apps(version.app for version in versions)
        if table.settings not in ({}, self.settings):
            self.settings, options = table.settings, table.settings["options"]
            self.replicas.max_tries, self.replicas.num_ingresses = options["tries"], options["ingresses"]
            self.on_settings_change(self.settings)
        self.models, self.revision = table.models, table.revision
        self.table_received.set()
        for version_id in self._withdrawn.keys() - {version.id for version in versions}:
            self._withdrawn.pop(version_id).set()


class RoutedStream:
    """The messages of a generation; restarted on another replica as long as the client has received no text."""

    def __init__(self, router: Router, name: str, job: GenerationJob) -> None:
        self.router, self.name, self.job = router, name, job
        self.version, self._started = router.version(name), time.perf_counter()
        self._retries = 0
        self._prompt: PromptInfo | None = None  # sent to the client
        self._choices: dict[int, Choice] = {}  # whole, of the chunks sent to the client
        self._refusal: Failure | None = None
        self._is_reported = False
        self._messages = self._start()

    def __aiter__(self) -> RoutedStream:
        return self

    async def __anext__(self) -> StreamMessage:
        """Return the next message, of whichever replica."""
        while True:
            try:
                coming: Awaitable[StreamMessage] = anext(self._messages)
                if not self._choices:
                    coming = self.router.unless_withdrawn(self.name, self.version, coming)
                message = await coming
            except StopAsyncIteration:
                self._finish(failed=False)
                raise
            except asyncio.CancelledError:
                self.cancel()
                raise
            except BackPressureError:
                if self._prompt or not self._restart_on_stable():
                    raise
                continue
            except Exception as error:
                if not await self._retry(error):
                    self._finish(failed=True)
                    raise
                continue
            if is_server_error(message):
                if not self._choices and self._fall_back():
                    continue
                self._finish(failed=True)
            if isinstance(message, PromptInfo):
                if self._prompt:
                    continue  # repeated by a retry
                self._prompt = message
            elif isinstance(message, StreamChunk):
                self._collect(message)
            else:
                self._refusal = message
            return message

    def cancel(self) -> None:
        """Stop the generation: the client has disconnected."""
        self._is_reported = True
        self._messages.cancel()

    def _start(self) -> Any:
        return self.router.replicas.stream(self.version, self.job, current_trace())

    async def _retry(self, error: Exception) -> bool:
        """Restart, if the client has received no text and another replica or the stable version is available."""
        if self._choices:
            return False
        if isinstance(error, RayActorError) and self._retries + 1 < self.router.replicas.max_tries:
            await asyncio.sleep(RETRY_DELAY_S * 2**self._retries)
            self._retries += 1
            self._messages = self._start()
            return True
        return self._fall_back()

    def _fall_back(self) -> bool:
        """Count a failure of the candidate and restart on the stable version; return False if that has failed."""
        version = self.version
        if not self._restart_on_stable():
            return False
        self.router.reporter.add_outcome(version.id, Outcome(True, 0.0))
        return True

    def _restart_on_stable(self) -> bool:
        stable = self.router.fall_back(self.name, self.version)
        if stable is None:
            return False
        self.version, self._started = stable, time.perf_counter()
        self._messages = self._start()
        return True

    def _collect(self, chunk: StreamChunk) -> None:
        for choice in chunk.choices:
            earlier = self._choices.get(choice.index)
            self._choices[choice.index] = replace(choice, text=earlier.text + choice.text) if earlier else choice

    def _finish(self, failed: bool) -> None:
        """Report the outcome, once."""
        if self._is_reported:
            return
        self._is_reported = True
        choices = [choice for _, choice in sorted(self._choices.items())]
        result = GenerationResult(self._prompt or PromptInfo(0, 0, []), choices)
        latency_s = (time.perf_counter() - self._started) / num_units(result)
        self.router.reporter.add_outcome(self.version.id, Outcome(failed, latency_s))
        if not failed:
            job = replace(self.job, stream=False)
            self.router.copy_to_shadow(self.name, "complete", job, self._refusal or result, latency_s)


def current_trace() -> TraceHeaders | None:
    """Return the trace of the present request; None where there is none."""
    request = _current_request.get()
    return request.trace if request else None


def is_server_error(message: object) -> bool:
    """Tell whether a replica failed for a reason that is not the request's."""
    return isinstance(message, Failure) and message.status >= 500


def num_units(result: Result | Failure) -> int:
    """Return the number of units by which a job's time is divided."""
    return 1 if isinstance(result, Failure) else result.num_units


def comparable(result: Result | Failure) -> Any:
    """Return the part of a result that two versions are compared by."""
    return asdict(result) if isinstance(result, Failure) else result.comparable

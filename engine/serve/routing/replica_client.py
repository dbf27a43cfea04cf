"""Calls of the replicas of a version: by a socket where there is one, else by Serve's handle, and again where one was lost."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterable
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError

from engine.serve.jobs import Failure, GenerationJob, Job, ModelInfo, Result
from engine.serve.routing.autoscaling import max_ongoing_requests
from engine.serve.routing.ipc import IpcClientPool, IpcConnection
from engine.serve.routing.messages import Version
from engine.serve.tracing import TraceHeaders

DISCOVERY_TIMEOUT_S = 5.0  # for replicas to say where they listen, or what they are
RETRY_DELAY_S = 0.1  # before the first retry; doubled for each further one


class ReplicaClient:
    """Calls replicas of all versions."""

    def __init__(self, max_tries: int, num_ingresses: int) -> None:
        """Take how often a request is given to replicas that are lost, and how many ingresses share the replicas."""
        self.max_tries, self.num_ingresses = max_tries, num_ingresses
        self._handles: dict[str, Any] = {}
        self._pool = IpcClientPool()
        self._node_id = ray.get_runtime_context().get_node_id()

    async def add_apps(self, apps: Iterable[str]) -> None:
        """Get a handle for each application that has none. Raises RayServeException for one that is gone."""
        for app in set(apps) - self._handles.keys():
            self._handles[app] = await asyncio.to_thread(serve.get_app_handle, app)

    async def call(self, version: Version, method: str, job: Job, trace: TraceHeaders | None) -> Result | Failure:
        """Call a method of a replica. Raises RayActorError where all tries were lost, BackPressureError for a full queue."""
        for attempt in range(self.max_tries):
            try:
                return await self._call_once(version, method, job, trace)
            except RayActorError:
                if attempt + 1 == self.max_tries:
                    raise
                await asyncio.sleep(RETRY_DELAY_S * 2**attempt)
        raise AssertionError

    async def _call_once(self, version: Version, method: str, job: Job, trace: TraceHeaders | None) -> Any:
        if connection := self._connection(version):
            return await connection.call(method, (job,), _trace_argument(trace))
        response = getattr(self._handles[version.app], method).remote(job, **_trace_argument(trace))
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    def stream(self, version: Version, job: GenerationJob, trace: TraceHeaders | None) -> Any:
        """Return the messages of a replica's stream, as an asynchronous iterator with `cancel()`."""
        if connection := self._connection(version):
            return connection.stream("stream", (job,), _trace_argument(trace))
        return self._handles[version.app].options(stream=True).stream.remote(job, **_trace_argument(trace))

    async def describe(self, version: Version) -> ModelInfo:
        """Ask a replica what its model is. Raises TimeoutError while none answers."""
        info: ModelInfo = await asyncio.wait_for(self._handles[version.app].describe.remote(), DISCOVERY_TIMEOUT_S)
        return info

    async def broadcast(self, app: str, method: str, timeout_s: float) -> list[Any]:
        """Call a method of all replicas of an application; errors are returned in place of results."""
        responses = self._handles[app].broadcast(method)
        results: list[Any] = await responses.results_async(timeout_s=timeout_s, return_exceptions=True)
        return results

    async def discover(self, apps: set[str]) -> None:
        """Connect to the present replicas of these applications, and disconnect from those of others."""
        self._pool.remove(self._pool.apps - apps)
        await asyncio.gather(*(self._discover(app) for app in apps & self._handles.keys()))

    async def _discover(self, app: str) -> None:
        with contextlib.suppress(Exception):  # no replica, or Serve is away: present connections are kept
            addresses = self.broadcast(app, "ipc_address", DISCOVERY_TIMEOUT_S)
            await self._pool.update(app, await asyncio.wait_for(addresses, 2 * DISCOVERY_TIMEOUT_S), self._node_id)

    def _connection(self, version: Version) -> IpcConnection | None:
        """Return the connection to the least loaded replica; None where Serve's handle has to schedule the request."""
        max_pending = math.ceil(max_ongoing_requests(version.options["max_num_seqs"]) / self.num_ingresses)
        return self._pool.least_loaded(version.app, max_pending)


def _trace_argument(trace: TraceHeaders | None) -> dict[str, TraceHeaders]:
    return {"trace": trace} if trace else {}

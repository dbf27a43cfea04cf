"""Calls of replicas: by which way, how often, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from engine.serve.jobs import ClassificationJob, GenerationJob, PromptInfo
from engine.serve.routing import replica_client as module
from engine.serve.routing.ipc import IpcAddress, IpcServer
from engine.serve.routing.messages import Version
from engine.serve.routing.replica_client import ReplicaClient

VERSION = Version("v", "app", "hash", "/folder", {"max_num_seqs": 1})
JOB = ClassificationJob(["text"])
GENERATION = GenerationJob(prompts=["text"], messages=None, max_tokens=4)


class Replica:
    """Answers by its socket."""

    def __init__(self) -> None:
        self.released, self.server = asyncio.Event(), IpcServer(self)

    async def classify(self, job: ClassificationJob, trace: dict[str, str] | None = None) -> Any:
        return "socket", job, trace

    async def hold(self, job: ClassificationJob, trace: dict[str, str] | None = None) -> Any:
        await self.released.wait()

    async def stream(self, job: GenerationJob, trace: dict[str, str] | None = None) -> AsyncIterator[Any]:
        yield PromptInfo(1, 0, [])

    async def ipc_address(self) -> IpcAddress:
        await self.server.start()
        return IpcAddress("here", self.server.socket_name)


class Handle:
    """Serve's handle of an application with one replica, which is lost some times before it answers."""

    def __init__(self, replica: Replica, times_lost: int = 0) -> None:
        self.replica, self.times_lost, self.num_calls = replica, times_lost, 0

    @property
    def classify(self) -> Any:
        async def answer(job: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            if self.num_calls <= self.times_lost:
                raise RayActorError
            return "handle", job, kwargs.get("trace")

        return SimpleNamespace(remote=answer)

    def broadcast(self, method: str) -> Any:
        async def results(timeout_s: float, return_exceptions: bool) -> list[Any]:
            return [await getattr(self.replica, method)()]

        return SimpleNamespace(results_async=results)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr(module, "RETRY_DELAY_S", 0.001)

    def run(work: Callable[[ReplicaClient, Handle], Coroutine[Any, Any, None]], times_lost: int = 0) -> None:
        async def main() -> None:
            handle = Handle(Replica(), times_lost)
            monkeypatch.setattr(module.serve, "get_app_handle", lambda app: handle)
            client = ReplicaClient(max_tries=3, num_ingresses=2)
            await client.add_apps(["app"])
            async with asyncio.timeout(20):
                await work(client, handle)

        asyncio.run(main())

    return run


def test_handle_is_used_until_replicas_are_discovered(run: Callable[..., None]) -> None:
    async def work(client: ReplicaClient, handle: Handle) -> None:
        trace = {"traceparent": "x"}
        assert await client.call(VERSION, "classify", JOB, trace) == ("handle", JOB, trace)
        await client.discover({"app", "unknown"})
        assert await client.call(VERSION, "classify", JOB, trace) == ("socket", JOB, trace)
        assert await client.call(VERSION, "classify", JOB, None) == ("socket", JOB, None)
        assert [message async for message in stream_of(client)] == [PromptInfo(1, 0, [])]
        await client.discover(set())
        assert (await client.call(VERSION, "classify", JOB, None))[0] == "handle"

    run(work)


async def stream_of(client: ReplicaClient) -> AsyncIterator[Any]:
    messages = client.stream(VERSION, GENERATION, None)
    while True:
        try:
            yield await anext(messages)
        except StopAsyncIteration:
            return


def test_requests_beyond_an_ingress_share_go_by_the_handle(run: Callable[..., None]) -> None:
    async def work(client: ReplicaClient, handle: Handle) -> None:
        await client.discover({"app"})
        held = [
            asyncio.ensure_future(client.call(VERSION, "hold", JOB, None)) for _ in range(2)
        ]  # of 4, for 2 ingresses
        while handle.replica.server.num_in_flight < 2:
            await asyncio.sleep(0.001)
        assert (await client.call(VERSION, "classify", JOB, None))[0] == "handle"
        handle.replica.released.set()
        await asyncio.gather(*held)
        assert (await client.call(VERSION, "classify", JOB, None))[0] == "socket"

    run(work)


def test_lost_replicas_are_retried(run: Callable[..., None]) -> None:
    async def work(client: ReplicaClient, handle: Handle) -> None:
        assert (await client.call(VERSION, "classify", JOB, None))[0] == "handle"
        assert handle.num_calls == 3

    run(work, times_lost=2)


def test_last_loss_is_raised(run: Callable[..., None]) -> None:
    async def work(client: ReplicaClient, handle: Handle) -> None:
        with pytest.raises(RayActorError):
            await client.call(VERSION, "classify", JOB, None)
        assert handle.num_calls == 3

    run(work, times_lost=3)

"""Lanes between an ingress and replicas, in one process: answers, parts, errors, cancelling, and ends of either side."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop
from ray.exceptions import RayActorError, RayTaskError

from engine.serve.routing.ipc import IpcConnection, IpcServer, Lanes


class Replica:
    """Answers at once, when it is let go, or never."""

    def __init__(self) -> None:
        self.go, self.cancelled = asyncio.Event(), 0

    async def double(self, number: int, trace: dict[str, str] | None = None) -> Any:
        return 2 * number, trace

    async def held(self, number: int) -> int:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number

    async def fail(self) -> None:
        raise ValueError("thirteen")

    async def parts(self, most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number
        if most == 13:
            await self.held(0)


async def soon(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


@pytest.fixture(
    params=[asyncio.new_event_loop, uvloop.new_event_loop]
)  # Ray's workers have uvloop where it is installed
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    def run(work: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(work)

    return run


Run = Callable[[Callable[[Replica, IpcServer, IpcConnection], Awaitable[None]]], None]


@pytest.fixture
def between(run: Callable[[Coroutine[Any, Any, None]], None]) -> Run:
    def between(work: Callable[[Replica, IpcServer, IpcConnection], Awaitable[None]]) -> None:
        async def both() -> None:
            replica = Replica()
            mouth = IpcServer(replica)
            await mouth.open()
            lane = await IpcConnection.to(mouth.name)
            async with asyncio.timeout(20):
                await work(replica, mouth, lane)
            lane.leave()
            await mouth.close(1.0)

        run(both())

    return between


def test_many_are_answered_side_by_side(between: Run) -> None:
    async def work(replica: Replica, mouth: IpcServer, lane: IpcConnection) -> None:
        held = [asyncio.ensure_future(lane.ask("held", (i,), {})) for i in range(20)]
        assert await lane.ask("double", (21,), {"trace": {"traceparent": "x"}}) == (42, {"traceparent": "x"})
        large = "x" * 10**6  # over a stream's own limit
        assert await lane.ask("double", (large,), {}) == (2 * large, None)
        await soon(lambda: mouth.under_way == 20)
        replica.go.set()
        assert await asyncio.gather(*held) == list(range(20))
        await soon(lambda: (mouth.under_way, lane.waiting) == (0, {}))

    between(work)


def test_parts_come_in_order_and_errors_are_told(between: Run) -> None:
    async def work(replica: Replica, mouth: IpcServer, lane: IpcConnection) -> None:
        stream = lane.stream("parts", (5,), {})
        assert [await anext(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(RayTaskError, match="ValueError: thirteen"):
            await lane.ask("fail", (), {})
        with pytest.raises(RayTaskError, match="has no attribute 'nothing'"):
            await lane.ask("nothing", (), {})
        assert await lane.ask("double", (1,), {}) == (2, None)

    between(work)


def test_what_nobody_waits_for_ends(between: Run) -> None:
    async def work(replica: Replica, mouth: IpcServer, lane: IpcConnection) -> None:
        asked, stream = asyncio.ensure_future(lane.ask("held", (1,), {})), lane.stream("parts", (13,), {})
        assert await anext(stream) == 0
        await soon(lambda: mouth.under_way == 2)
        asked.cancel()
        stream.cancel()
        await soon(lambda: (mouth.under_way, replica.cancelled) == (0, 2))
        assert not lane.waiting

    between(work)


def test_a_lost_ingress_ends_what_it_asked_for(between: Run) -> None:
    async def work(replica: Replica, mouth: IpcServer, lane: IpcConnection) -> None:
        other = await IpcConnection.to(mouth.name)
        mine, its = (asyncio.ensure_future(it.ask("held", (1,), {})) for it in (lane, other))
        await soon(lambda: mouth.under_way == 2)
        other.sender.writer.transport.abort()
        await soon(lambda: (mouth.under_way, replica.cancelled) == (1, 1))
        with pytest.raises(RayActorError):
            await its
        replica.go.set()
        assert await mine == 1

    between(work)


def test_a_lost_replica_is_told(between: Run) -> None:
    async def work(replica: Replica, mouth: IpcServer, lane: IpcConnection) -> None:
        asked, stream = asyncio.ensure_future(lane.ask("held", (1,), {})), lane.stream("parts", (13,), {})
        assert [await anext(stream) for _ in range(13)] == list(range(13))
        await soon(lambda: mouth.under_way == 2)
        for sender in mouth.senders:
            sender.writer.transport.abort()
        with pytest.raises(RayActorError):
            await asked
        with pytest.raises(RayActorError):
            await anext(stream)
        with pytest.raises(RayActorError):
            await lane.ask("double", (1,), {})

    between(work)


def test_a_replica_that_ends_answers_what_it_has(between: Run) -> None:
    async def work(replica: Replica, mouth: IpcServer, lane: IpcConnection) -> None:
        asked = asyncio.ensure_future(lane.ask("held", (1,), {}))
        await soon(lambda: mouth.under_way)
        closing = asyncio.ensure_future(mouth.close(10.0))
        late = await lane.ask("double", (2,), {})  # sent before it was heard that it closes
        await soon(lambda: lane.closing)
        assert not closing.done()
        replica.go.set()
        assert (await asked, late) == (1, (4, None))
        await closing
        with pytest.raises(OSError):
            await IpcConnection.to(mouth.name)

    between(work)


def test_lanes_go_where_all_replicas_are_near(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def work() -> None:
        mouths, lanes = [IpcServer(Replica()) for _ in range(2)], Lanes()
        for mouth in mouths:
            await mouth.open()
        here = [{"node": "here", "name": mouth.name} for mouth in mouths]
        await lanes.follow("app", here, "here")
        first = lanes.free("app", 1)
        assert first
        assert lanes.free("other", 1) is None
        held = asyncio.ensure_future(first.ask("held", (1,), {}))
        await asyncio.sleep(0)
        second = lanes.free("app", 1)
        assert second
        assert {first.name, second.name} == {mouth.name for mouth in mouths}
        more = asyncio.ensure_future(second.ask("held", (2,), {}))
        await asyncio.sleep(0)
        assert lanes.free("app", 1) is None
        assert lanes.free("app", 2)
        own = next(mouth for mouth in mouths if mouth.name == first.name)
        await lanes.follow("app", [it for it in here if it["name"] != first.name], "here")  # it was taken off
        assert lanes.free("app", 9) is second
        await soon(lambda: own.under_way == 1)
        own.replica.go.set()  # type: ignore[attr-defined]
        assert await held == 1
        await soon(lambda: first.lost)
        for far in ({"node": "there", "name": "x"}, TimeoutError()):
            await lanes.follow("app", [*here, far], "here")
            assert lanes.free("app", 9) is None
        lanes.forget(["app"])
        assert not lanes.apps
        more.cancel()

    run(work())


def test_other_users_are_sent_away(between: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(replica: Replica, mouth: IpcServer, lane: IpcConnection) -> None:
        monkeypatch.setattr("engine.serve.routing.ipc.os.getuid", lambda: 12345)
        with pytest.raises(OSError):
            await IpcConnection.to(mouth.name)
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stranger.setblocking(False)
        await asyncio.get_running_loop().sock_connect(stranger, f"\0{mouth.name}")
        assert await asyncio.get_running_loop().sock_recv(stranger, 1) == b""
        stranger.close()

    between(work)

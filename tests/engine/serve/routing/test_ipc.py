"""Sockets between an ingress and replicas, in one process: results, streams, errors, cancellation, and loss of either end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop
from ray.exceptions import RayActorError, RayTaskError

from engine.serve.routing.ipc import IpcAddress, IpcClientPool, IpcConnection, IpcServer


class Replica:
    """Answers at once, when it is released, or never."""

    def __init__(self) -> None:
        self.released, self.cancelled = asyncio.Event(), 0

    async def double(self, number: int, trace: dict[str, str] | None = None) -> Any:
        return 2 * number, trace

    async def held(self, number: int) -> int:
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number

    async def fail(self) -> None:
        raise ValueError("thirteen")

    async def items(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number
        if count == 13:
            await self.held(0)


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
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
def connected(run: Callable[[Coroutine[Any, Any, None]], None]) -> Run:
    def connected(work: Callable[[Replica, IpcServer, IpcConnection], Awaitable[None]]) -> None:
        async def serve_and_run() -> None:
            replica = Replica()
            server = IpcServer(replica)
            await server.start()
            connection = await IpcConnection.connect(server.socket_name)
            async with asyncio.timeout(20):
                await work(replica, server, connection)
            connection.close_when_idle()
            await server.close(1.0)

        run(serve_and_run())

    return connected


def test_calls_run_concurrently(connected: Run) -> None:
    async def work(replica: Replica, server: IpcServer, connection: IpcConnection) -> None:
        held = [asyncio.ensure_future(connection.call("held", (i,), {})) for i in range(20)]
        assert await connection.call("double", (21,), {"trace": {"traceparent": "x"}}) == (42, {"traceparent": "x"})
        large = "x" * 10**6  # over a stream's own limit
        assert await connection.call("double", (large,), {}) == (2 * large, None)
        await eventually(lambda: server.num_in_flight == 20)
        replica.released.set()
        assert await asyncio.gather(*held) == list(range(20))
        await eventually(lambda: (server.num_in_flight, connection.pending) == (0, {}))

    connected(work)


def test_stream_keeps_order_and_errors_reach_the_client(connected: Run) -> None:
    async def work(replica: Replica, server: IpcServer, connection: IpcConnection) -> None:
        stream = connection.stream("items", (5,), {})
        assert [await anext(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(RayTaskError, match="ValueError: thirteen"):
            await connection.call("fail", (), {})
        with pytest.raises(RayTaskError, match="has no attribute 'nothing'"):
            await connection.call("nothing", (), {})
        assert await connection.call("double", (1,), {}) == (2, None)

    connected(work)


def test_cancelled_calls_end_on_the_replica(connected: Run) -> None:
    async def work(replica: Replica, server: IpcServer, connection: IpcConnection) -> None:
        call, stream = asyncio.ensure_future(connection.call("held", (1,), {})), connection.stream("items", (13,), {})
        assert await anext(stream) == 0
        await eventually(lambda: server.num_in_flight == 2)
        call.cancel()
        stream.cancel()
        await eventually(lambda: (server.num_in_flight, replica.cancelled) == (0, 2))
        assert not connection.pending

    connected(work)


def test_a_lost_ingress_cancels_its_calls(connected: Run) -> None:
    async def work(replica: Replica, server: IpcServer, connection: IpcConnection) -> None:
        other = await IpcConnection.connect(server.socket_name)
        own, others = (asyncio.ensure_future(client.call("held", (1,), {})) for client in (connection, other))
        await eventually(lambda: server.num_in_flight == 2)
        other.writer.writer.transport.abort()
        await eventually(lambda: (server.num_in_flight, replica.cancelled) == (1, 1))
        with pytest.raises(RayActorError):
            await others
        replica.released.set()
        assert await own == 1

    connected(work)


def test_a_lost_replica_raises_for_pending_calls(connected: Run) -> None:
    async def work(replica: Replica, server: IpcServer, connection: IpcConnection) -> None:
        call, stream = asyncio.ensure_future(connection.call("held", (1,), {})), connection.stream("items", (13,), {})
        assert [await anext(stream) for _ in range(13)] == list(range(13))
        await eventually(lambda: server.num_in_flight == 2)
        for writer in server.writers:
            writer.writer.transport.abort()
        with pytest.raises(RayActorError):
            await call
        with pytest.raises(RayActorError):
            await anext(stream)
        with pytest.raises(RayActorError):
            await connection.call("double", (1,), {})

    connected(work)


def test_a_closing_server_finishes_its_calls(connected: Run) -> None:
    async def work(replica: Replica, server: IpcServer, connection: IpcConnection) -> None:
        call = asyncio.ensure_future(connection.call("held", (1,), {}))
        await eventually(lambda: server.num_in_flight)
        closing = asyncio.ensure_future(server.close(10.0))
        late = await connection.call("double", (2,), {})  # sent before the client knows that the server closes
        await eventually(lambda: connection.is_closing)
        assert not closing.done()
        replica.released.set()
        assert (await call, late) == (1, (4, None))
        await closing
        with pytest.raises(OSError):
            await IpcConnection.connect(server.socket_name)

    connected(work)


def test_the_pool_connects_while_all_replicas_are_on_this_node(
    run: Callable[[Coroutine[Any, Any, None]], None],
) -> None:
    async def work() -> None:
        servers, pool = [IpcServer(Replica()) for _ in range(2)], IpcClientPool()
        for server in servers:
            await server.start()
        local = [IpcAddress("here", server.socket_name) for server in servers]
        await pool.update("app", local, "here")
        first = pool.least_loaded("app", 1)
        assert first
        assert pool.least_loaded("other", 1) is None
        held = asyncio.ensure_future(first.call("held", (1,), {}))
        await asyncio.sleep(0)
        second = pool.least_loaded("app", 1)
        assert second
        assert {first.socket_name, second.socket_name} == {server.socket_name for server in servers}
        more = asyncio.ensure_future(second.call("held", (2,), {}))
        await asyncio.sleep(0)
        assert pool.least_loaded("app", 1) is None
        assert pool.least_loaded("app", 2)
        removed = next(server for server in servers if server.socket_name == first.socket_name)
        await pool.update("app", [address for address in local if address.socket_name != first.socket_name], "here")
        assert pool.least_loaded("app", 9) is second
        await eventually(lambda: removed.num_in_flight == 1)
        removed.replica.released.set()  # type: ignore[attr-defined]
        assert await held == 1
        await eventually(lambda: first.is_lost)
        for other in (IpcAddress("there", "x"), TimeoutError()):
            await pool.update("app", [*local, other], "here")
            assert pool.least_loaded("app", 9) is None
        pool.remove(["app"])
        assert not pool.apps
        more.cancel()

    run(work())


def test_other_users_are_rejected(connected: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(replica: Replica, server: IpcServer, connection: IpcConnection) -> None:
        monkeypatch.setattr("engine.serve.routing.ipc.os.getuid", lambda: 12345)
        with pytest.raises(OSError):
            await IpcConnection.connect(server.socket_name)
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stranger.setblocking(False)
        await asyncio.get_running_loop().sock_connect(stranger, f"\0{server.socket_name}")
        assert await asyncio.get_running_loop().sock_recv(stranger, 1) == b""
        stranger.close()

    connected(work)

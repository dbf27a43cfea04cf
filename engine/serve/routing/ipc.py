"""Sockets from an ingress to the replicas on its node, without Ray Serve's scheduling in between.

A call through a Serve handle costs as much as the forward pass of a small model. Serve handles are still used to discover
replicas, and for requests beyond what the replicas take at once, which Serve queues, rejects or scales up for. Sockets are
used while all replicas of an application run on the ingress' node; their requests count for the autoscaler
(`engine.serve.routing.autoscaling`).

The sockets have abstract names (unix(7)), which vanish with their process, and each end accepts only its own user. Frames
are pickled `CallFrame`s from the client and `ReplyFrame`s from the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import secrets
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from ray.exceptions import RayActorError, RayTaskError

FRAME_LENGTH = struct.Struct("<I")  # precedes each frame, in bytes
CONNECT_TIMEOUT_S = 2.0
MAX_BUFFERED_BYTES = 2**16  # kept for one write at the next turn of the event loop
CLOSE_POLL_S = 0.02  # between two checks that all calls are answered while a server closes

RESULT, ITEM, END, ERROR, CLOSING = range(5)  # kinds of replies


class CallFrame(NamedTuple):
    """A call of a replica's method; `method` None cancels the call of this id."""

    call_id: int
    method: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ReplyFrame(NamedTuple):
    """A reply to a call: its RESULT; an ITEM or the END of a generator; the traceback of an ERROR. CLOSING has call id 0."""

    call_id: int
    kind: int
    value: Any = None


@dataclass(frozen=True)
class IpcAddress:
    """Where a replica listens: its Ray node, and the abstract socket name on it."""

    node_id: str
    socket_name: str


def is_same_user(writer: asyncio.StreamWriter) -> bool:
    """Tell whether the peer process belongs to this process's user."""
    credentials = writer.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


class FrameWriter:
    """Writes frames; those of one turn of the event loop, such as a step's tokens, in one write, which wakes the peer once."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._buffer = bytearray()

    def write(self, frame: CallFrame | ReplyFrame) -> None:
        """Queue a frame; dropped if the connection is closed."""
        packed = pickle.dumps((*frame,), protocol=5)  # a plain tuple: a named one would be pickled with its class
        if not self._buffer:
            asyncio.get_running_loop().call_soon(self._flush)
        self._buffer += FRAME_LENGTH.pack(len(packed)) + packed

    async def drain(self) -> None:
        """Wait until the peer has read enough for more frames to be written."""
        if len(self._buffer) > MAX_BUFFERED_BYTES:
            self._flush()
        await self.writer.drain()

    def close(self) -> None:
        """Write the queued frames and close the connection."""
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        if self._buffer and not self.writer.is_closing():
            self.writer.write(bytes(self._buffer))
        self._buffer.clear()


async def read_frame(reader: asyncio.StreamReader) -> tuple[Any, ...] | None:
    """Return the fields of the next frame; None once the connection is closed."""
    try:
        (length,) = FRAME_LENGTH.unpack(await reader.readexactly(FRAME_LENGTH.size))
        fields: tuple[Any, ...] = pickle.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return fields


class IpcServer:
    """A replica's end of all its connections."""

    def __init__(self, replica: object) -> None:
        """Serve the methods of a replica: coroutines and asynchronous generators."""
        self.replica, self.socket_name = replica, f"manta-{secrets.token_hex(16)}"
        self.num_in_flight = self.num_requests = 0
        self.writers: set[FrameWriter] = set()
        self._server: asyncio.AbstractServer | None = None

    @property
    def is_listening(self) -> bool:
        """Whether the server was started."""
        return self._server is not None

    async def start(self) -> None:
        """Start to listen; a second call does nothing."""
        if self._server is None:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0{self.socket_name}")
            self._server = await asyncio.start_unix_server(self._serve_connection, sock=listener)

    async def close(self, timeout_s: float) -> None:
        """Accept no more calls, and return once all are answered and all clients disconnected, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        if self._server:
            self._server.close()
        for writer in self.writers:
            writer.write(ReplyFrame(0, CLOSING))
        while self.writers and time.monotonic() < deadline:
            await asyncio.sleep(CLOSE_POLL_S)

    async def _serve_connection(self, reader: asyncio.StreamReader, stream_writer: asyncio.StreamWriter) -> None:
        if not is_same_user(stream_writer):
            stream_writer.close()
            return
        tasks: dict[int, asyncio.Task[None]] = {}
        writer = FrameWriter(stream_writer)
        self.writers.add(writer)
        try:
            while fields := await read_frame(reader):
                call = CallFrame(*fields)
                if call.method is None:
                    if call.call_id in tasks:
                        tasks[call.call_id].cancel()
                    continue
                task = tasks[call.call_id] = asyncio.get_running_loop().create_task(self._handle(writer, call))
                task.add_done_callback(lambda _, call_id=call.call_id: tasks.pop(call_id))  # type: ignore[misc]
        finally:
            for task in tasks.values():
                task.cancel()
            self.writers.discard(writer)
            writer.close()

    async def _handle(self, writer: FrameWriter, call: CallFrame) -> None:
        assert call.method
        self.num_in_flight, self.num_requests = self.num_in_flight + 1, self.num_requests + 1
        try:
            result = getattr(self.replica, call.method)(*call.args, **call.kwargs)
            if hasattr(result, "__aiter__"):
                async for item in result:
                    writer.write(ReplyFrame(call.call_id, ITEM, item))
                    await writer.drain()
                writer.write(ReplyFrame(call.call_id, END))
            else:
                writer.write(ReplyFrame(call.call_id, RESULT, await result))
        except Exception:
            writer.write(ReplyFrame(call.call_id, ERROR, traceback.format_exc()))
        finally:
            self.num_in_flight -= 1


class IpcConnection:
    """An ingress' connection to one replica. Calls that are pending when the replica is lost raise RayActorError."""

    def __init__(self, socket_name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.socket_name, self.writer = socket_name, FrameWriter(writer)
        self.pending: dict[int, Callable[[int, Any], None]] = {}  # call id -> called with (kind, value) of each reply
        self.is_closing = self.is_lost = False
        self._reader = reader
        self._call_ids = count(1)
        self._reading = asyncio.get_running_loop().create_task(self._read_replies())

    @classmethod
    async def connect(cls, socket_name: str) -> IpcConnection:
        """Connect to a replica. Raises OSError, TimeoutError."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.setblocking(False)
            client.connect(f"\0{socket_name}")
            reader, writer = await asyncio.wait_for(asyncio.open_unix_connection(sock=client), CONNECT_TIMEOUT_S)
        except BaseException:
            client.close()
            raise
        if not is_same_user(writer):
            writer.close()
            raise ConnectionRefusedError(socket_name)
        return cls(socket_name, reader, writer)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a method returns. Raises RayTaskError for what it raises."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_reply(kind: int, value: Any) -> None:
            if not future.done():
                future.set_result(value) if kind == RESULT else future.set_exception(call_error(method, value))

        call_id = self.begin_call(method, args, kwargs, on_reply)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel_call(call_id)
            raise
        finally:
            self.end_call(call_id)

    def stream(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> IpcStream:
        """Return the items that a generator method yields."""
        return IpcStream(self, method, args, kwargs)

    def begin_call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_reply: Callable[[int, Any], None]
    ) -> int:
        """Send a call and return its id. Raises RayActorError where the replica is lost."""
        if self.is_lost:
            raise RayActorError
        call_id = next(self._call_ids)
        self.pending[call_id] = on_reply
        self.writer.write(CallFrame(call_id, method, args, kwargs))
        return call_id

    def cancel_call(self, call_id: int) -> None:
        """Tell the replica that nobody waits for this call any more."""
        self.writer.write(CallFrame(call_id, None, (), {}))

    def end_call(self, call_id: int) -> None:
        """Ignore further replies to a call."""
        self.pending.pop(call_id, None)
        if self.is_closing:
            self.close_when_idle()

    def close_when_idle(self) -> None:
        """Take no more calls, and close the connection once none is pending."""
        self.is_closing = True
        if not self.pending:
            self.writer.close()

    async def _read_replies(self) -> None:
        try:
            while fields := await read_frame(self._reader):
                call_id, kind, value = fields  # of a ReplyFrame
                if kind == CLOSING:
                    self.close_when_idle()
                elif on_reply := self.pending.get(call_id):
                    on_reply(kind, value)
        finally:
            self.is_lost = True
            self.writer.close()
            for on_reply in list(self.pending.values()):
                on_reply(ERROR, None)


class IpcStream:
    """The items of a replica's generator, read from a connection."""

    def __init__(self, connection: IpcConnection, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.connection, self.method = connection, method
        self._replies: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._call_id = connection.begin_call(
            method, args, kwargs, lambda kind, value: self._replies.put_nowait((kind, value))
        )

    async def __anext__(self) -> Any:
        """Return the next item."""
        kind, value = await self._replies.get()
        if kind == ITEM:
            return value
        self.connection.end_call(self._call_id)
        if kind == END:
            raise StopAsyncIteration
        raise call_error(self.method, value)

    def cancel(self) -> None:
        """Stop the generator on the replica."""
        if self._call_id in self.connection.pending:
            self.connection.cancel_call(self._call_id)
            self.connection.end_call(self._call_id)


def call_error(method: str, remote_traceback: str | None) -> Exception:
    """Return the error of a call from the replica's traceback; None: the replica was lost."""
    if remote_traceback is None:
        return RayActorError()
    return RayTaskError(method, remote_traceback, RuntimeError(remote_traceback.strip().splitlines()[-1]))


class IpcClientPool:
    """An ingress' connections to the replicas of each application."""

    def __init__(self) -> None:
        self._connections: dict[str, list[IpcConnection]] = {}

    @property
    def apps(self) -> set[str]:
        """The applications whose replicas are followed."""
        return set(self._connections)

    def least_loaded(self, app: str, max_pending: int) -> IpcConnection | None:
        """Return the connection with the fewest pending calls, of those with less than `max_pending`; None if there is none."""
        usable = [
            connection for connection in self._connections.get(app, ())
            if not (connection.is_closing or connection.is_lost) and len(connection.pending) < max_pending
        ]  # fmt: skip
        return min(usable, key=lambda connection: len(connection.pending), default=None)

    async def update(self, app: str, addresses: Sequence[IpcAddress | BaseException], node_id: str) -> None:
        """Connect to an application's replicas, and disconnect from those that left.

        `addresses` are the replicas' own answers. Where one is on another node, or is an error, no connection is kept, and
        Serve's handle schedules all requests.
        """
        all_local = all(isinstance(address, IpcAddress) and address.node_id == node_id for address in addresses)
        names = (
            {address.socket_name for address in addresses if isinstance(address, IpcAddress)} if all_local else set()
        )
        connections = [connection for connection in self._connections.get(app, ()) if not connection.is_lost]
        for connection in connections:
            if connection.socket_name not in names:
                connection.close_when_idle()
        self._connections[app] = [connection for connection in connections if not connection.is_closing]
        for name in names - {connection.socket_name for connection in connections}:
            with contextlib.suppress(OSError, TimeoutError):  # the replica has just ended
                self._connections[app].append(await IpcConnection.connect(name))

    def remove(self, apps: Iterable[str]) -> None:
        """Disconnect from applications that are routed to no more."""
        for app in apps:
            for connection in self._connections.pop(app, ()):
                connection.close_when_idle()

"""A short way from an ingress to replicas on its node: a socket each, without Serve's scheduling in between.

A call by a Serve handle costs as much as the forward of a small model. What the handle does beside it stays with it: it
finds the replicas, and it takes what they have no room for, to queue it, refuse it or wake a replica. Lanes are used while
all replicas of an application are on the ingress' node; what they carry counts for the autoscaler (`engine.serve.routing.autoscaling`).

The sockets have abstract names, which vanish with their process and which each end only takes from its own user. Frames are
pickled: (number, method, args, kwargs) there, method None to cancel; (number, what, it) back.
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
from itertools import count
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

LENGTH = struct.Struct("<I")
DONE, PART, END, ERROR, CLOSING = range(5)
CONNECT_S = 2.0
MOST_BYTES = 2**16  # that wait for the loop's next turn
LOOK_S = 0.02  # between two looks at whether all is answered, when a replica ends

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


def is_own(writer: Writer) -> bool:
    """Tell whether the other end belongs to this process's user."""
    other = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", other)[1] == os.getuid())


class Sender:
    """Sends frames to the other end: those of one turn of the loop, such as a step's tokens, in one piece, which wakes it once."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._packed = bytearray()

    def put(self, frame: tuple[Any, ...]) -> None:
        """Send a frame; to an end that is gone nothing."""
        packed = pickle.dumps(frame, protocol=5)
        if not self._packed:
            asyncio.get_running_loop().call_soon(self._send)
        self._packed += LENGTH.pack(len(packed)) + packed

    async def drain(self) -> None:
        """Return once the other end has read so much that more may be put."""
        if len(self._packed) > MOST_BYTES:
            self._send()
        await self.writer.drain()

    def close(self) -> None:
        """Send what was put, and end the connection."""
        self._send()
        self.writer.close()

    def _send(self) -> None:
        if self._packed and not self.writer.is_closing():
            self.writer.write(bytes(self._packed))
        self._packed.clear()


async def take(reader: Reader) -> tuple[Any, ...] | None:
    """Return the next frame; None where the other end has gone."""
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        frame: tuple[Any, ...] = pickle.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return frame


class IpcServer:
    """A replica's end of all its lanes."""

    def __init__(self, replica: object) -> None:
        """Answer by a replica's methods: coroutines, and generators of parts."""
        self.replica, self.name = replica, f"manta-{secrets.token_hex(16)}"
        self.under_way = self.taken = 0  # requests
        self.senders: set[Sender] = set()
        self.server: asyncio.AbstractServer | None = None

    async def open(self) -> None:
        """Begin to listen, if it hasn't yet."""
        if self.server is None:
            ear = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            ear.bind(f"\0{self.name}")
            self.server = await asyncio.start_unix_server(self._hear, sock=ear)

    async def close(self, within_s: float) -> None:
        """Ask for no more, and return once all that came is answered and every other end has gone, or `within_s` later."""
        deadline = time.monotonic() + within_s
        if self.server:
            self.server.close()
        for sender in self.senders:
            sender.put((0, CLOSING, None))
        while self.senders and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)

    async def _hear(self, reader: Reader, writer: Writer) -> None:
        if not is_own(writer):
            writer.close()
            return
        own: dict[int, asyncio.Task[None]] = {}
        sender = Sender(writer)
        self.senders.add(sender)
        try:
            while frame := await take(reader):
                number, method, args, kwargs = frame
                if method is None:
                    if number in own:
                        own[number].cancel()
                    continue
                task = own[number] = asyncio.get_running_loop().create_task(self._answer(sender, number, method, args, kwargs))  # fmt: skip
                task.add_done_callback(lambda _, number=number: own.pop(number))  # type: ignore[misc]
        finally:
            for task in own.values():
                task.cancel()
            self.senders.discard(sender)
            sender.close()

    async def _answer(self, sender: Sender, number: int, method: str, args: Any, kwargs: Any) -> None:
        self.under_way, self.taken = self.under_way + 1, self.taken + 1
        try:
            found = getattr(self.replica, method)(*args, **kwargs)
            if hasattr(found, "__aiter__"):
                async for part in found:
                    sender.put((number, PART, part))
                    await sender.drain()
                sender.put((number, END, None))
            else:
                sender.put((number, DONE, await found))
        except Exception:
            sender.put((number, ERROR, traceback.format_exc()))
        finally:
            self.under_way -= 1


class IpcConnection:
    """An ingress' end of one lane. What its replica hadn't answered when it was lost raises RayActorError."""

    def __init__(self, name: str, reader: Reader, writer: Writer) -> None:
        self.name, self.reader, self.sender = name, reader, Sender(writer)
        self.waiting: dict[int, Callable[[int, Any], None]] = {}  # called with each frame for a request
        self.closing = self.lost = False
        self._numbers = count(1)
        self._hearing = asyncio.get_running_loop().create_task(self._hear())

    @classmethod
    async def to(cls, name: str) -> IpcConnection:
        """Connect to a replica. Raises OSError, TimeoutError."""
        mouth = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            mouth.setblocking(False)
            mouth.connect(f"\0{name}")
            reader, writer = await asyncio.wait_for(asyncio.open_unix_connection(sock=mouth), CONNECT_S)
        except BaseException:
            mouth.close()
            raise
        if not is_own(writer):
            writer.close()
            raise ConnectionRefusedError(name)
        return cls(name, reader, writer)

    async def ask(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a method answers. Raises RayTaskError for what it raises."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def heard(what: int, it: Any) -> None:
            if not future.done():
                future.set_result(it) if what == DONE else future.set_exception(failure(method, it))

        number = self._begin(method, args, kwargs, heard)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(number)
            raise
        finally:
            self._end(number)

    def stream(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
        """Return the parts of what a method yields."""
        return Parts(self, method, args, kwargs)

    def cancel(self, number: int) -> None:
        """Tell the replica that nobody waits for an answer any more."""
        self.sender.put((number, None, (), {}))

    def leave(self) -> None:
        """Give out no more by this lane, and close it once all is answered."""
        self.closing = True
        if not self.waiting:
            self.sender.close()

    def _begin(self, method: str, args: Any, kwargs: Any, heard: Callable[[int, Any], None]) -> int:
        if self.lost:
            raise RayActorError
        number = next(self._numbers)
        self.waiting[number] = heard
        self.sender.put((number, method, args, kwargs))
        return number

    def _end(self, number: int) -> None:
        self.waiting.pop(number, None)
        if self.closing:
            self.leave()

    async def _hear(self) -> None:
        try:
            while frame := await take(self.reader):
                number, what, it = frame
                if what == CLOSING:
                    self.leave()
                elif heard := self.waiting.get(number):
                    heard(what, it)
        finally:
            self.lost = True
            self.sender.close()
            for heard in list(self.waiting.values()):
                heard(ERROR, None)


class Parts:
    """What a replica's generator yields, by a lane."""

    def __init__(self, lane: IpcConnection, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lane, self.method = lane, method
        self.frames: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.number = lane._begin(method, args, kwargs, lambda what, it: self.frames.put_nowait((what, it)))

    async def __anext__(self) -> Any:
        """Return the next part."""
        what, it = await self.frames.get()
        if what == PART:
            return it
        self.lane._end(self.number)
        if what == END:
            raise StopAsyncIteration
        raise failure(self.method, it)

    def cancel(self) -> None:
        """Nobody reads any further."""
        if self.number in self.lane.waiting:
            self.lane.cancel(self.number)
            self.lane._end(self.number)


def failure(method: str, told: str | None) -> Exception:
    """Return what stands for an answer that didn't come: as told by the replica, or None where that was lost."""
    return RayActorError() if told is None else RayTaskError(method, told, RuntimeError(told.strip().splitlines()[-1]))


class Lanes:
    """The lanes of an ingress to the replicas of each application."""

    def __init__(self) -> None:
        self._lanes: dict[str, list[IpcConnection]] = {}

    def free(self, app: str, most: int) -> IpcConnection | None:
        """Return the lane with the least under way, of those with less than `most`; None where there is none."""
        usable = [lane for lane in self._lanes.get(app, ()) if not (lane.closing or lane.lost) and len(lane.waiting) < most]  # fmt: skip
        return min(usable, key=lambda lane: len(lane.waiting), default=None)

    @property
    def apps(self) -> set[str]:
        """The applications that there are lanes to."""
        return set(self._lanes)

    async def follow(self, app: str, told: Sequence[Any], node: str) -> None:
        """Have a lane to each replica of an application, as these say where they are: {"node", "name"}, or an error."""
        near = all(isinstance(it, dict) and it["node"] == node for it in told)
        names = {it["name"] for it in told} if near else set()
        kept = [lane for lane in self._lanes.get(app, ()) if not lane.lost]
        for lane in kept:
            if lane.name not in names:
                lane.leave()
        self._lanes[app] = [lane for lane in kept if not lane.closing]
        for name in names - {lane.name for lane in kept}:
            with contextlib.suppress(OSError, TimeoutError):  # it has just ended
                self._lanes[app].append(await IpcConnection.to(name))

    def forget(self, apps: Iterable[str]) -> None:
        """Close the lanes of applications that are asked no more."""
        for app in apps:
            for lane in self._lanes.pop(app, ()):
                lane.leave()

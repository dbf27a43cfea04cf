"""What clients gave to learn from: feedback, and requests that they let be kept. Arrow streams, one file a process.

A record is on the disk when `write` returns: each write appends a record batch to the stream and waits for fsync, those
that come meanwhile share the next. A stream needs no end: a process that was killed leaves whole batches and at most one
torn one, of records that nobody was told were kept; `read_records` stops there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

FILE_BYTES = 64 * 2**20  # from this size on a new file is begun

WHO = [
    ("request", pa.string()),  # the request's id
    ("time", pa.timestamp("us", "UTC")),
    ("model", pa.string()),
    ("version", pa.string()),  # first digits of the bundle's hash
    ("key", pa.string()),  # name of the key; empty where none was needed
]
# Of one request there may be several: what was said last holds. `rating` is 1 or -1.
FEEDBACK = pa.schema([*WHO, ("rating", pa.int8()), ("label", pa.string()), ("text", pa.string()), ("comment", pa.string())])  # fmt: skip
# `input` and `output` are JSON: the request's body, and its answers as [{"text", "reason"}] or [{"label", "scores"}].
REQUESTS = pa.schema([*WHO, ("path", pa.string()), ("input", pa.string()), ("output", pa.string()), ("seconds", pa.float64())])  # fmt: skip
KINDS = {"feedback": FEEDBACK, "requests": REQUESTS}

Record = dict[str, Any]


class Recorder:
    """Appends records of one kind, from a thread of its own."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Write `kind`-*.arrows in a folder, of which neither is made before there is a record."""
        self.folder, self.kind, self.schema = folder, kind, KINDS[kind]
        self._asked: queue.SimpleQueue[tuple[Record, Future[None]]] = queue.SimpleQueue()
        self._out: IO[bytes] | None = None
        self._writer: Any = None
        threading.Thread(target=self._run, name=f"recorder of {kind}", daemon=True).start()

    async def write(self, record: Record) -> None:
        """Return once a record is on the disk. Raises OSError where it cannot be written."""
        done: Future[None] = Future()
        self._asked.put((record, done))
        await asyncio.wrap_future(done)

    def _run(self) -> None:
        while True:
            asked = [self._asked.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    asked.append(self._asked.get_nowait())
            error: Exception | None = None
            try:
                self._append([record for record, _ in asked])
            except Exception as caught:  # what follows a torn batch could not be read: the next begins a new file
                error = caught
                self._close()
            for _, done in asked:
                if not done.set_running_or_notify_cancel():
                    continue
                done.set_exception(error) if error else done.set_result(None)

    def _append(self, records: list[Record]) -> None:
        batch = pa.RecordBatch.from_pylist(records, self.schema)
        if self._out is None or self._out.tell() > FILE_BYTES:
            self._close()
            self._open()
        assert self._out
        self._writer.write_batch(batch)
        self._out.flush()
        os.fsync(self._out.fileno())

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        path = self.folder / f"{self.kind}-{moment}-{os.getpid()}-{time.monotonic_ns()}.arrows"
        self._out = path.open("xb")
        self._writer = pa.ipc.new_stream(self._out, self.schema)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the file itself may be gone after a loss of power
        finally:
            os.close(folder)

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            if self._out:
                self._out.close()
        self._out = self._writer = None


def read_records(folder: Path, kind: str) -> pa.Table:
    """Return all records of a kind, the eldest first; a torn end of a file is passed over."""
    batches = []
    for file in sorted(folder.glob(f"{kind}-*.arrows")):
        with contextlib.suppress(pa.ArrowInvalid, OSError, StopIteration):  # a file's end, whole or torn
            stream = pa.ipc.open_stream(file.read_bytes())
            while True:
                batches.append(stream.read_next_batch())
    return pa.Table.from_batches(batches, KINDS[kind]).sort_by("time")

"""Records to train on: feedback, and requests whose clients allow them to be stored. Arrow streams, one file per process.

A record is on disk when `write` returns: each write appends a record batch to the stream and waits for fsync; records that
come meanwhile share the next batch. A stream needs no end marker: a process that is killed leaves whole batches and at most
one torn batch, of records that were never acknowledged; `read_records` stops there.
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

FILE_BYTES = 64 * 2**20  # a new file is started from this size on

COMMON_FIELDS = [
    ("request", pa.string()),  # the request's id
    ("time", pa.timestamp("us", "UTC")),
    ("model", pa.string()),
    ("version", pa.string()),  # first digits of the bundle's hash
    ("key", pa.string()),  # name of the API key; empty without one
]
# There may be several for one request: the last one counts. `rating` is 1 or -1.
FEEDBACK_SCHEMA = pa.schema([*COMMON_FIELDS, ("rating", pa.int8()), ("label", pa.string()), ("text", pa.string()), ("comment", pa.string())])  # fmt: skip
# `input` and `output` are JSON: the request's body, and its outputs as [{"text", "reason"}] or [{"label", "scores"}].
REQUEST_SCHEMA = pa.schema([*COMMON_FIELDS, ("path", pa.string()), ("input", pa.string()), ("output", pa.string()), ("seconds", pa.float64())])  # fmt: skip
SCHEMAS = {"feedback": FEEDBACK_SCHEMA, "requests": REQUEST_SCHEMA}

Record = dict[str, Any]


class RecordWriter:
    """Appends records of one kind, in its own thread."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Write `kind`-*.arrows in a folder; both are made with the first record."""
        self.folder, self.kind, self.schema = folder, kind, SCHEMAS[kind]
        self._queue: queue.SimpleQueue[tuple[Record, Future[None]]] = queue.SimpleQueue()
        self._file: IO[bytes] | None = None
        self._stream: Any = None
        threading.Thread(target=self._run, name=f"writer of {kind}", daemon=True).start()

    async def write(self, record: Record) -> None:
        """Return once a record is on disk. Raises OSError if it cannot be written."""
        done: Future[None] = Future()
        self._queue.put((record, done))
        await asyncio.wrap_future(done)

    def _run(self) -> None:
        while True:
            pending = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    pending.append(self._queue.get_nowait())
            error: Exception | None = None
            try:
                self._append([record for record, _ in pending])
            except Exception as caught:  # nothing after a torn batch can be read: start a new file
                error = caught
                self._close()
            for _, done in pending:
                if not done.set_running_or_notify_cancel():
                    continue
                done.set_exception(error) if error else done.set_result(None)

    def _append(self, records: list[Record]) -> None:
        batch = pa.RecordBatch.from_pylist(records, self.schema)
        if self._file is None or self._file.tell() > FILE_BYTES:
            self._close()
            self._open()
        assert self._file
        self._stream.write_batch(batch)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        path = self.folder / f"{self.kind}-{moment}-{os.getpid()}-{time.monotonic_ns()}.arrows"
        self._file = path.open("xb")
        self._stream = pa.ipc.new_stream(self._file, self.schema)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the file itself may be lost with the power
        finally:
            os.close(folder)

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file:
                self._file.close()
        self._file = self._stream = None


def read_records(folder: Path, kind: str) -> pa.Table:
    """Return all records of a kind, oldest first; the torn end of a file is skipped."""
    batches = []
    for file in sorted(folder.glob(f"{kind}-*.arrows")):
        with contextlib.suppress(pa.ArrowInvalid, OSError, StopIteration):  # end of the file, whole or torn
            stream = pa.ipc.open_stream(file.read_bytes())
            while True:
                batches.append(stream.read_next_batch())
    return pa.Table.from_batches(batches, SCHEMAS[kind]).sort_by("time")

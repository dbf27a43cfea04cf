"""How much a key may ask: requests and tokens a minute. Decisions only, so that tables can test them.

A bucket holds a minute's worth and fills evenly (the token bucket, https://en.wikipedia.org/wiki/Token_bucket). What a
request will write is not known before it has ended: it is charged the most that it may come to, and given back the rest.

Several ingresses of one node share what is left, in a file for each bucket under a lock that is held for microseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.serve.http.api_keys import Key

MINUTE_S = 60.0
KEPT = struct.Struct("<dd")  # of a bucket in a file: `left` and `filled`


@dataclass
class Bucket:
    """What is left of a minute's worth. Times are of one clock, in seconds."""

    size: float
    left: float
    filled: float  # when

    def fill(self, now: float) -> None:
        """Add what has come since the last time."""
        self.left = min(self.left + (now - self.filled) * self.size / MINUTE_S, self.size)
        self.filled = now

    def wait_s(self, amount: float, now: float) -> float:
        """Return in how many seconds so much is there; 0: now. What is over the size needs a full bucket."""
        self.fill(now)
        return max(min(amount, self.size) - self.left, 0.0) * MINUTE_S / self.size

    def take(self, amount: float) -> None:
        """Take so much, into debt if need be; a negative amount is given back."""
        self.left = min(self.left - amount, self.size)


class Limits:
    """The buckets of all keys that have asked; with a folder, those of all processes that have it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def request(self, key: Key, now: float) -> float:
        """Charge a request, or return in how many seconds the key may ask again. `now`: of time.monotonic."""
        return self._charge(key, "requests", key.requests_per_minute, 1, now)

    def reserve(self, key: Key, tokens: int, now: float) -> float:
        """Charge tokens, or return in how many seconds there are as many."""
        return self._charge(key, "tokens", key.tokens_per_minute, tokens, now)

    def settle(self, key: Key, reserved: int, used: int) -> None:
        """Give back what of the reserved tokens was not used, or charge what was used beyond."""
        if key.tokens_per_minute is not None and used != reserved:
            with self._bucket(key, "tokens", key.tokens_per_minute) as bucket:
                bucket.take(used - reserved)

    def _charge(self, key: Key, kind: str, per_minute: int | None, amount: float, now: float) -> float:
        if per_minute is None:
            return 0.0
        with self._bucket(key, kind, per_minute) as bucket:
            wait_s = bucket.wait_s(amount, now)
            if not wait_s:
                bucket.take(amount)
            return wait_s

    @contextlib.contextmanager
    def _bucket(self, key: Key, kind: str, size: float) -> Iterator[Bucket]:
        """Give a key's bucket, a full one where there is none yet, to be changed within the block."""
        if self.folder:
            with shared(self.folder / f"{key.sha256}.{kind}", size) as bucket:
                yield bucket
        else:
            yield self._buckets.setdefault((key.sha256, kind), Bucket(size, size, 0.0))


@contextlib.contextmanager
def shared(file: Path, size: float) -> Iterator[Bucket]:
    """Give the bucket that a file keeps, which no other process changes meanwhile.

    It is written in one call: a process that is killed leaves it as it was or as it shall be.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        kept = os.pread(descriptor, KEPT.size, 0)
        left, filled = KEPT.unpack(kept) if kept else (size, 0.0)
        bucket = Bucket(size, min(left, size), filled)
        yield bucket
        os.pwrite(descriptor, KEPT.pack(bucket.left, bucket.filled), 0)
    finally:
        os.close(descriptor)

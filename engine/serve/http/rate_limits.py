"""Rate limits of API keys, in requests and tokens per minute. Pure decisions, with the time as an argument.

A bucket holds a minute's worth and refills evenly (token bucket, https://en.wikipedia.org/wiki/Token_bucket). The tokens
that a request will generate are not known before it has ended: it is charged the maximum, and refunded the rest.

Several ingresses of one node share the buckets: a file each, under a lock that is held for microseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.serve.http.api_keys import ApiKey

MINUTE_S = 60.0
BUCKET_FORMAT = struct.Struct("<dd")  # of a bucket in a file: `level` and `updated_at`


@dataclass
class TokenBucket:
    """A bucket of a minute's worth. Times are seconds on one clock."""

    capacity: float
    level: float  # what may still be used; below 0: debt
    updated_at: float

    def refill(self, now: float) -> None:
        """Add what has accrued since the last update."""
        self.level = min(self.level + (now - self.updated_at) * self.capacity / MINUTE_S, self.capacity)
        self.updated_at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until an amount is available; 0: now. An amount over the capacity needs a full bucket."""
        self.refill(now)
        return max(min(amount, self.capacity) - self.level, 0.0) * MINUTE_S / self.capacity

    def take(self, amount: float) -> None:
        """Take an amount, into debt if need be; a negative amount is a refund."""
        self.level = min(self.level - amount, self.capacity)


class RateLimiter:
    """The buckets of all keys that have sent requests; with a folder, shared by all processes that use it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._buckets: dict[tuple[str, str], TokenBucket] = {}

    def charge_request(self, key: ApiKey, now: float) -> float:
        """Charge a request and return 0, or return the seconds until the key may send one. `now`: of time.monotonic."""
        return self._charge(key, "requests", key.requests_per_minute, 1, now)

    def reserve_tokens(self, key: ApiKey, tokens: int, now: float) -> float:
        """Charge tokens and return 0, or return the seconds until they are available."""
        return self._charge(key, "tokens", key.tokens_per_minute, tokens, now)

    def settle_tokens(self, key: ApiKey, reserved: int, used: int) -> None:
        """Refund reserved tokens that were not used, or charge the tokens used beyond them."""
        if key.tokens_per_minute is not None and used != reserved:
            with self._bucket(key, "tokens", key.tokens_per_minute) as bucket:
                bucket.take(used - reserved)

    def _charge(self, key: ApiKey, kind: str, per_minute: int | None, amount: float, now: float) -> float:
        if per_minute is None:
            return 0.0
        with self._bucket(key, kind, per_minute) as bucket:
            wait_s = bucket.wait_s(amount, now)
            if not wait_s:
                bucket.take(amount)
            return wait_s

    @contextlib.contextmanager
    def _bucket(self, key: ApiKey, kind: str, capacity: float) -> Iterator[TokenBucket]:
        """Yield a key's bucket, to be changed within the block; a full one if there is none yet."""
        if self.folder:
            with shared_bucket(self.folder / f"{key.sha256}.{kind}", capacity) as bucket:
                yield bucket
        else:
            yield self._buckets.setdefault((key.sha256, kind), TokenBucket(capacity, capacity, 0.0))


@contextlib.contextmanager
def shared_bucket(file: Path, capacity: float) -> Iterator[TokenBucket]:
    """Yield the bucket stored in a file, locked against other processes within the block.

    It is written in one call: a process that is killed leaves the old or the new state.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        stored = os.pread(descriptor, BUCKET_FORMAT.size, 0)
        level, updated_at = BUCKET_FORMAT.unpack(stored) if stored else (capacity, 0.0)
        bucket = TokenBucket(capacity, min(level, capacity), updated_at)
        yield bucket
        os.pwrite(descriptor, BUCKET_FORMAT.pack(bucket.level, bucket.updated_at), 0)
    finally:
        os.close(descriptor)

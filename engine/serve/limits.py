"""How much a key may ask: requests and tokens a minute. Decisions only, so that tables can test them.

A bucket holds a minute's worth and fills evenly (the token bucket, https://en.wikipedia.org/wiki/Token_bucket). What a
request will write is not known before it has ended: it is charged the most that it may come to, and given back the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.serve.keys import Key

MINUTE_S = 60.0


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
    """The buckets of all keys that have asked."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def request(self, key: Key, now: float) -> float:
        """Charge a request, or return in how many seconds the key may ask again."""
        return self._charge(key, "requests", key.requests_per_minute, 1, now)

    def reserve(self, key: Key, tokens: int, now: float) -> float:
        """Charge tokens, or return in how many seconds there are as many."""
        return self._charge(key, "tokens", key.tokens_per_minute, tokens, now)

    def settle(self, key: Key, reserved: int, used: int) -> None:
        """Give back what of the reserved tokens was not used, or charge what was used beyond."""
        if bucket := self._buckets.get((key.sha256, "tokens")):
            bucket.take(used - reserved)

    def _charge(self, key: Key, kind: str, per_minute: int | None, amount: float, now: float) -> float:
        if per_minute is None:
            return 0.0
        bucket = self._buckets.setdefault((key.sha256, kind), Bucket(per_minute, per_minute, now))
        wait_s = bucket.wait_s(amount, now)
        if not wait_s:
            bucket.take(amount)
        return wait_s

"""What the next step of generation does. Decisions only: no tensor, no clock and no thread, so tables can test them.

Completions wait in a queue that is fair between clients, hold a lane of the key/value cache while they run, and share
each forward: one token for those that write, and chunks of prompt for those that read (Agrawal et al. 2024, Sarathi).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
GRAIN = 64  # tokens: lanes grow by multiples of it
WORTH_WAITING = 32  # shared tokens for which a newcomer waits while another reads them


class FairQueue(Generic[T]):
    """First come, first served for one client; between clients, who has had the fewest tokens goes first.

    After Sheng et al. 2024, https://arxiv.org/abs/2401.00588: a client that comes back starts level with the least
    served of those that are here, so that nobody saves up turns. Tokens are charged as they are asked for; what was not
    used is given back.
    """

    def __init__(self) -> None:
        self._lines: dict[str, deque[T]] = {}
        self._charged: dict[str, int] = {}  # tokens, of the clients that are here
        self._here: dict[str, int] = {}  # completions waiting or running

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def push(self, client: str, item: T) -> None:
        """Put an item at the end of its client's line."""
        if client not in self._here:
            self._charged[client] = min(self._charged.values(), default=0)
        self._here[client] = self._here.get(client, 0) + 1
        self._lines.setdefault(client, deque()).append(item)

    def first(self) -> tuple[str, T] | None:
        """Return whose turn it is, and the item; None where nothing waits."""
        if not self._lines:
            return None
        client = min(self._lines, key=lambda client: self._charged[client])
        return client, self._lines[client][0]

    def start(self, client: str, tokens: int) -> None:
        """Take a client's first item off its line and charge its tokens."""
        self._lines[client].popleft()
        self._charged[client] += tokens
        if not self._lines[client]:
            del self._lines[client]

    def end(self, client: str, unused: int) -> None:
        """Give back the tokens that a started item did not use."""
        self._charged[client] -= unused
        self._leave(client)

    def remove(self, condition: Callable[[T], bool]) -> list[T]:
        """Take every waiting item off that meets a condition, and return them."""
        removed = []
        for client in list(self._lines):
            line = self._lines[client]
            gone = [item for item in line if condition(item)]
            if not gone:
                continue
            removed += gone
            self._lines[client] = deque(item for item in line if item not in gone)
            if not self._lines[client]:
                del self._lines[client]
            for _ in gone:
                self._leave(client)
        return removed

    def _leave(self, client: str) -> None:
        self._here[client] -= 1
        if not self._here[client]:
            del self._here[client], self._charged[client]


def schedule_tokens(pending: Sequence[int], budget: int) -> list[int]:
    """Return how many of its pending tokens each sequence (the eldest first) puts into a forward of about `budget`.

    Those that write have one pending token and always get it; what is left of the budget goes to the readers' prompts,
    and the first of them gets a token at least, so that each comes to its end.
    """
    left = max(budget - sum(1 for tokens in pending if tokens == 1), 1)
    dealt = []
    for tokens in pending:
        share = 1 if tokens == 1 else min(tokens, left)
        left -= share if tokens > 1 else 0
        dealt.append(share)
    return dealt


@dataclass(frozen=True)
class Slot:
    """A lane of the cache, as the policy sees it."""

    held: np.ndarray  # tokens whose keys and values it holds, in order
    coming: np.ndarray  # those that it will hold once its sequence has read its prompt; the same where none reads
    busy: bool
    used: int  # step of its last use
    adapter: str = ""  # by which its keys and values were made


@dataclass(frozen=True)
class SlotAllocation:
    """Where a newcomer goes, and whose first tokens it takes over (its own lane's, where the two are the same)."""

    lane: int
    source: int
    shared: int  # tokens


def allocate_slot(prompt: np.ndarray, lanes: Sequence[Slot], adapter: str = "") -> SlotAllocation | None:
    """Return a free lane for a prompt and what of it is in the cache already; None while waiting is better, or needed.

    The last token of a prompt is always read anew, for its logits. What another adapter read is no use.
    """
    free = [i for i, lane in enumerate(lanes) if not lane.busy]
    if not free:
        return None
    most = len(prompt) - 1
    shared = [min(common_prefix_len(prompt, lane.held), most) if lane.adapter == adapter else 0 for lane in lanes]
    source = max(range(len(lanes)), key=lambda i: (shared[i], not lanes[i].busy))
    reading = (lane for lane in lanes if lane.busy and lane.adapter == adapter)
    soon = max((min(common_prefix_len(prompt, lane.coming), most) for lane in reading), default=0)
    if soon >= shared[source] + WORTH_WAITING:
        return None
    # A lane is taken over where little more than the shared text would be lost, else the one longest out of use.
    if not lanes[source].busy and len(lanes[source].held) <= 2 * shared[source]:
        return SlotAllocation(source, source, shared[source])
    lane = min(free, key=lambda i: (len(lanes[i].held) > 0, lanes[i].used))
    return SlotAllocation(lane, source, shared[source])


def common_prefix_len(a: np.ndarray, b: np.ndarray) -> int:
    """Count the tokens that two sequences begin with alike."""
    length = min(len(a), len(b))
    if length == 0 or a[0] != b[0]:
        return 0
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


@dataclass(frozen=True)
class CacheShape:
    """Lanes of the cache, and the tokens that each has room for."""

    lanes: int
    capacity: int


def cache_shape_for(needs: Sequence[int], max_num_seqs: int, cache_tokens: int, positions: int) -> CacheShape:
    """Return the cache's shape for sequences that need so many tokens each: as many lanes as fit, `max_num_seqs` at most.

    With short sequences all `max_num_seqs` lanes are there, each with an equal part of the cache (`positions` at most); a
    long one makes them fewer and longer.
    """
    most = min(positions, cache_tokens)
    wanted = min(-(-max(needs, default=1) // GRAIN) * GRAIN, most)
    capacity = max(wanted, min(cache_tokens // max_num_seqs, most))
    return CacheShape(min(max_num_seqs, cache_tokens // capacity), capacity)

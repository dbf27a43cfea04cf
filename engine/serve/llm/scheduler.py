"""What the next step of generation does. Decisions only: no tensor and no thread, so that tables test them.

Sequences wait in a queue that is fair between clients, hold a slot of the KV cache while they run, and share each
forward: one token of each that decodes, and chunks of prompts in prefill (Agrawal et al. 2024, Sarathi).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

from engine.serve.llm.kv_cache import KVCacheManager
from engine.serve.llm.sequence import QueueFull, Sequence

T = TypeVar("T")
POLL_S = 0.05  # between two looks at the queue for deadlines


class ScheduledSequence(NamedTuple):
    """One sequence's part of a forward."""

    slot: int
    num_computed_tokens: int  # in the KV cache already
    tokens: list[int]  # the next ones
    num_logits: int  # of how many of these tokens, from the end, logits are returned
    adapter: str = ""


class FairQueue(Generic[T]):
    """First come, first served within a client; between clients, the one with the fewest tokens so far is next.

    After Sheng et al. 2024, https://arxiv.org/abs/2401.00588: a client that comes back starts level with the least
    served of the active ones, so that idle time earns no credit. Tokens are charged as they are requested; unused ones
    are given back.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._charged: dict[str, int] = {}  # tokens, of active clients
        self._num_active: dict[str, int] = {}  # items waiting or started, of active clients

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def push(self, client: str, item: T) -> None:
        """Append an item to its client's queue."""
        if client not in self._num_active:
            self._charged[client] = min(self._charged.values(), default=0)
        self._num_active[client] = self._num_active.get(client, 0) + 1
        self._waiting.setdefault(client, deque()).append(item)

    def first(self) -> tuple[str, T] | None:
        """Return the client that is next, and its item; None where nothing waits."""
        if not self._waiting:
            return None
        client = min(self._waiting, key=lambda client: self._charged[client])
        return client, self._waiting[client][0]

    def start(self, client: str, tokens: int) -> None:
        """Remove a client's first item from its queue and charge its tokens."""
        self._waiting[client].popleft()
        self._charged[client] += tokens
        if not self._waiting[client]:
            del self._waiting[client]

    def finish(self, client: str, unused: int) -> None:
        """Give back the tokens that a started item did not use."""
        self._charged[client] -= unused
        self._remove_active(client)

    def remove(self, condition: Callable[[T], bool]) -> list[T]:
        """Remove every waiting item that meets a condition, and return them."""
        removed = []
        for client in list(self._waiting):
            matches = [item for item in self._waiting[client] if condition(item)]
            if not matches:
                continue
            removed += matches
            self._waiting[client] = deque(item for item in self._waiting[client] if item not in matches)
            if not self._waiting[client]:
                del self._waiting[client]
            for _ in matches:
                self._remove_active(client)
        return removed

    def _remove_active(self, client: str) -> None:
        self._num_active[client] -= 1
        if not self._num_active[client]:
            del self._num_active[client], self._charged[client]


class EngineQueue:
    """Sequences on their way into an engine and out of it: a bounded waiting queue, and outputs to report.

    Clients' threads add and abort, the engine's thread does the rest. `changed` is the lock, and a condition that is
    notified when there is something new for the engine's thread.
    """

    def __init__(self, max_queue: int, on_output: Callable[[list[Sequence]], None]) -> None:
        """Let `max_queue` sequences wait. `on_output` gets those with new tokens, or that are finished."""
        self.max_queue, self.on_output = max_queue, on_output
        self.changed = threading.Condition()  # re-entrant
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._outputs: list[Sequence] = []
        self._has_aborted = False
        self._polled_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequences: list[Sequence], max_seq_len: int) -> None:
        """Queue sequences, all or none. Raises QueueFull; ValueError for one of more than `max_seq_len` tokens."""
        if max(sequence.max_total_tokens for sequence in sequences) > max_seq_len:
            raise ValueError(f"a sequence may have {max_seq_len} tokens, its prompt included")
        with self.changed:
            if len(self._waiting) + len(sequences) > self.max_queue:
                raise QueueFull
            now = time.monotonic()
            for sequence in sequences:
                sequence.queued_at = now
                self._waiting.push(sequence.client, sequence)
            self.changed.notify()

    def abort(self, sequences: list[Sequence]) -> None:
        """Mark sequences as aborted; the engine drops them before its next step."""
        with self.changed:
            for sequence in sequences:
                sequence.aborted = True
            self._has_aborted = True
            self.changed.notify()

    def drop_waiting(self) -> bool:
        """Drop waiting sequences that are aborted or past their deadline; return whether running ones may be aborted."""
        with self.changed:
            now = time.monotonic()
            if self._has_aborted or now > self._polled_at + POLL_S:
                self._polled_at = now
                for sequence in self._waiting.remove(lambda waiting: waiting.aborted or waiting.deadline < now):
                    sequence.finish_reason = "expired"
                    self.report(sequence)
            has_aborted, self._has_aborted = self._has_aborted, False
            return has_aborted

    def first(self) -> Sequence | None:
        """Return the sequence that is next; None where none waits."""
        first = self._waiting.first()
        return first[1] if first else None

    def start(self, sequence: Sequence) -> None:
        """Remove the first sequence from the queue, and charge its client."""
        self._waiting.start(sequence.client, sequence.max_total_tokens)
        sequence.scheduled_at = time.monotonic()

    def finish(self, sequence: Sequence, reason: str, error: str = "") -> None:
        """Finish a started sequence, and report it."""
        with self.changed:
            self._waiting.finish(sequence.client, sequence.max_total_tokens - sequence.num_tokens)
        sequence.finished_at = time.monotonic()
        sequence.error, sequence.finish_reason = error, reason
        self.report(sequence)

    def fail_waiting(self, error: str, condition: Callable[[Sequence], bool] = lambda _: True) -> None:
        """Finish the waiting sequences that meet a condition with an error."""
        with self.changed:
            for sequence in self._waiting.remove(condition):
                sequence.error, sequence.finish_reason = error, "error"
                self.report(sequence)

    def report(self, sequence: Sequence) -> None:
        """Note a sequence that has something new, for `flush_outputs`."""
        self._outputs.append(sequence)

    def flush_outputs(self) -> None:
        """Call `on_output` with the sequences that were reported."""
        if not self._outputs:
            return
        with self.changed:
            outputs, self._outputs = self._outputs, []
        self.on_output(outputs)


class AdapterCache(Protocol):
    """What the scheduler asks of `lora.LoraAdapters`."""

    @property
    def loaded(self) -> Container[str]:
        """Names of the adapters in memory."""

    def has_room(self, in_use: Collection[str]) -> bool:
        """Return whether one more can be loaded while those of `in_use` have to stay."""


class Scheduler:
    """Starts waiting sequences as slots become free, and divides each step's tokens among the running ones."""

    def __init__(
        self, queue: EngineQueue, kv_cache: KVCacheManager, adapters: AdapterCache, max_batched_tokens: int
    ) -> None:
        """Take `max_batched_tokens` tokens into a step, about."""
        self.queue, self.kv_cache, self.adapters = queue, kv_cache, adapters
        self.max_batched_tokens = max_batched_tokens
        self.running: list[Sequence] = []  # the oldest first
        self.num_steps = 0
        self.num_cached_tokens = 0  # of all prompts so far, found in the prefix cache

    @property
    def adapters_in_use(self) -> set[str]:
        """Names of the running sequences' adapters."""
        return {sequence.adapter for sequence in self.running}

    def drop_aborted(self) -> None:
        """Drop aborted sequences, and those that had no slot by their deadline."""
        if self.queue.drop_waiting():
            for sequence in [running for running in self.running if running.aborted]:
                self.finish(sequence, "abort")

    def admit(self) -> str:
        """Start waiting sequences until one has to wait; return the adapter that has to be loaded for it, else ""."""
        while sequence := self.queue.first():
            if sequence.adapter and sequence.adapter not in self.adapters.loaded:
                return sequence.adapter if self.adapters.has_room(self.adapters_in_use) else ""
            if not self.kv_cache.allocate(sequence):
                return ""
            self.queue.start(sequence)
            self.num_cached_tokens += sequence.num_cached_tokens
            self.running.append(sequence)
        return ""

    def schedule(self, draft_tokens: Mapping[Sequence, list[int]]) -> list[tuple[Sequence, ScheduledSequence]]:
        """Return the next step: each sequence that is in it, with its tokens; draft tokens follow the last of them."""
        self.num_steps += 1
        batch = []
        pending = [sequence.num_pending_tokens for sequence in self.running]
        counts = schedule_tokens(pending, self.max_batched_tokens)
        for sequence, num_pending, count in zip(self.running, pending, counts, strict=True):
            if not count:
                continue
            draft = draft_tokens.get(sequence, [])
            is_scored = sequence.needs_prompt_logprobs and not sequence.tokens
            num_logits = count if is_scored else int(count == num_pending)
            inputs = ScheduledSequence(
                sequence.slot, sequence.num_computed_tokens, [*sequence.next_tokens(count), *draft],
                num_logits + len(draft), sequence.adapter,
            )  # fmt: skip
            batch.append((sequence, inputs))
        return batch

    def finish(self, sequence: Sequence, reason: str, error: str = "") -> None:
        """Finish a running sequence and free its slot."""
        self.running.remove(sequence)
        self.kv_cache.free(sequence, self.num_steps)
        self.queue.finish(sequence, reason, error)


def schedule_tokens(pending: list[int], budget: int) -> list[int]:
    """Return how many pending tokens of each sequence (the oldest first) go into a forward of about `budget` tokens.

    Those that decode have one pending token and always get it. The rest of the budget goes to the prompts in prefill;
    the first of them gets at least one token, so that it makes progress however many decode.
    """
    left = max(budget - sum(1 for tokens in pending if tokens == 1), 1)
    counts = []
    for tokens in pending:
        count = 1 if tokens == 1 else min(tokens, left)
        left -= count if tokens > 1 else 0
        counts.append(count)
    return counts

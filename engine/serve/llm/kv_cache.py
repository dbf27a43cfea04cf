"""Slots of the KV cache: which sequence has which, what is cached in each, and how the cache is divided into slots.

Policy and bookkeeping only; there is no tensor here. The tensors are in `CacheStorage`s (a model runner, a draft model),
which the manager tells what to move, so that it is tested without a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.serve.llm.sequence import Sequence

CAPACITY_MULTIPLE = 64  # tokens: the capacity of slots is a multiple of it
MIN_PREFIX_TO_WAIT = 32  # tokens in common with a prompt in prefill for which a new sequence waits
NO_TOKENS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class CacheShape:
    """Number of slots, and tokens that each has room for."""

    num_slots: int
    capacity: int


@dataclass(frozen=True)
class Slot:
    """What is in a slot."""

    tokens: np.ndarray  # in order, of which it holds keys and values
    after_prefill: np.ndarray  # those that it will hold once its sequence's prompt is computed; else the same
    busy: bool
    last_used: int  # step
    adapter: str = ""  # by which keys and values were computed


@dataclass(frozen=True)
class SlotAllocation:
    """The slot of a new sequence, and the slot that holds its cached prefix; the same one where no copy is needed."""

    slot: int
    source: int
    num_cached_tokens: int


class CacheStorage(Protocol):
    """Keys and values in slots."""

    def reshape(self, num_slots: int, capacity: int, keep: Iterable[tuple[int, int]] = ()) -> None:
        """Reallocate the cache; `keep` are (slot, tokens) that become slots 0, 1, ... of the new one."""

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        """Give a slot to a new sequence, whose first tokens are those of slot `source`: copy them unless it is the same."""


class KVCacheManager:
    """Allocates slots to sequences, and frees them; what a free slot holds is reused for prompts with the same prefix."""

    def __init__(
        self,
        max_num_seqs: int,
        cache_tokens: int,
        max_positions: int,
        storages: Collection[CacheStorage] = (),
        prefix_caching: bool = True,
    ) -> None:
        """Divide `cache_tokens` tokens among up to `max_num_seqs` slots of up to `max_positions` tokens."""
        self.max_num_seqs, self.cache_tokens, self.max_positions = max_num_seqs, cache_tokens, max_positions
        self.storages, self.prefix_caching = storages, prefix_caching
        self._sequences: list[Sequence] = []  # that have a slot, the oldest first
        self._reshape(cache_shape_for([], max_num_seqs, cache_tokens, max_positions))

    @property
    def num_used_tokens(self) -> int:
        """Tokens of the sequences that have a slot."""
        return sum(sequence.num_computed_tokens for sequence in list(self._sequences))

    @property
    def num_total_tokens(self) -> int:
        """Tokens that all slots have room for."""
        return self.shape.num_slots * self.shape.capacity

    def allocate(self, sequence: Sequence) -> SlotAllocation | None:
        """Give a sequence a slot, with what is cached of its prompt; None: it has to wait.

        Where no slot is free or large enough, the cache is reshaped if that helps.
        """
        if sequence.max_total_tokens > self.shape.capacity or len(self._sequences) >= self.shape.num_slots:
            lengths = [other.max_total_tokens for other in (*self._sequences, sequence)]
            shape = cache_shape_for(lengths, self.max_num_seqs, self.cache_tokens, self.max_positions)
            if shape == self.shape or shape.num_slots <= len(self._sequences):
                return None
            self._reshape(shape)
        allocation = self._find_slot(sequence)
        if allocation is None:
            return None
        for storage in self.storages:
            storage.assign_slot(allocation.slot, allocation.source, allocation.num_cached_tokens)
        sequence.slot = allocation.slot
        sequence.num_computed_tokens = sequence.num_cached_tokens = allocation.num_cached_tokens
        self._sequences.append(sequence)
        return allocation

    def free(self, sequence: Sequence, step: int) -> None:
        """Free a sequence's slot at a step; what it holds stays for prompts with the same prefix until it is evicted."""
        self._sequences.remove(sequence)
        tokens = np.asarray([*sequence.prompt, *sequence.tokens])[: sequence.num_computed_tokens]
        self._free_slots[sequence.slot] = Slot(tokens, tokens, False, step, sequence.adapter)

    def _reshape(self, shape: CacheShape) -> None:
        """Reshape the cache: sequences that have a slot keep their tokens, cached prefixes are evicted."""
        keep = [(sequence.slot, sequence.num_computed_tokens) for sequence in self._sequences]
        for storage in self.storages:
            storage.reshape(shape.num_slots, shape.capacity, keep)
        for slot, sequence in enumerate(self._sequences):
            sequence.slot = slot
        self.shape = shape
        self._free_slots = [Slot(NO_TOKENS, NO_TOKENS, False, 0)] * shape.num_slots  # as they were left when freed

    def _find_slot(self, sequence: Sequence) -> SlotAllocation | None:
        if self.prefix_caching:
            # A prompt whose log-probabilities are asked for goes through the model as a whole, for its logits.
            prompt = np.asarray(sequence.prompt[: 1 if sequence.needs_prompt_logprobs else None])
            return allocate_slot(prompt, self._slots(), sequence.adapter)
        busy = {other.slot for other in self._sequences}
        slot = next(slot for slot in range(self.shape.num_slots) if slot not in busy)
        return SlotAllocation(slot, slot, 0)

    def _slots(self) -> list[Slot]:
        slots = list(self._free_slots)
        for sequence in self._sequences:
            tokens = np.asarray([*sequence.prompt, *sequence.tokens])
            slots[sequence.slot] = Slot(tokens[: sequence.num_computed_tokens], tokens, True, 0, sequence.adapter)
        return slots


def allocate_slot(prompt: np.ndarray, slots: list[Slot], adapter: str = "") -> SlotAllocation | None:
    """Return a free slot for a prompt and what is cached of it; None where it has to wait, or waiting is better.

    The last token of a prompt is always computed, for its logits. What another adapter computed cannot be shared.
    """
    free = [i for i, slot in enumerate(slots) if not slot.busy]
    if not free:
        return None
    max_cached = len(prompt) - 1

    def common_len(tokens: np.ndarray) -> int:
        return min(common_prefix_len(prompt, tokens), max_cached)

    cached = [common_len(slot.tokens) if slot.adapter == adapter else 0 for slot in slots]
    source = max(range(len(slots)), key=lambda i: (cached[i], not slots[i].busy))
    in_prefill = (slot for slot in slots if slot.busy and slot.adapter == adapter)
    cached_soon = max((common_len(slot.after_prefill) for slot in in_prefill), default=0)
    if cached_soon >= cached[source] + MIN_PREFIX_TO_WAIT:
        return None
    # Reuse a slot in place where little more than the shared prefix would be evicted, else take an empty or the least
    # recently used one.
    if not slots[source].busy and len(slots[source].tokens) <= 2 * cached[source]:
        return SlotAllocation(source, source, cached[source])
    slot = min(free, key=lambda i: (len(slots[i].tokens) > 0, slots[i].last_used))
    return SlotAllocation(slot, source, cached[source])


def common_prefix_len(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many first tokens of two sequences are the same."""
    length = min(len(a), len(b))
    if length == 0 or a[0] != b[0]:
        return 0
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def cache_shape_for(lengths: Iterable[int], max_num_seqs: int, cache_tokens: int, max_positions: int) -> CacheShape:
    """Return the cache's shape for sequences of up to these lengths: as many slots as fit, `max_num_seqs` at most.

    With short sequences there are `max_num_seqs` slots with an equal part of the cache each (`max_positions` at most); a
    long one makes them fewer and larger.
    """
    max_capacity = min(max_positions, cache_tokens)
    needed = min(-(-max(lengths, default=1) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, max_capacity)
    capacity = max(needed, min(cache_tokens // max_num_seqs, max_capacity))
    return CacheShape(min(max_num_seqs, cache_tokens // capacity), capacity)

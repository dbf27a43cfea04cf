"""Slots of the KV cache by tables, and the manager's bookkeeping with a storage that only notes what it is told."""

from __future__ import annotations

import numpy as np
import pytest

from engine.serve.llm.kv_cache import (
    CacheShape,
    KVCacheManager,
    Slot,
    SlotAllocation,
    allocate_slot,
    cache_shape_for,
    common_prefix_len,
)
from engine.serve.llm.sequence import Sequence

EMPTY = np.zeros(0, dtype=np.int64)


def slot(tokens: list[int], after_prefill: list[int] | None = None, busy: bool = False, last_used: int = 0) -> Slot:
    cached = np.array(tokens, dtype=np.int64)
    return Slot(cached, cached if after_prefill is None else np.array(after_prefill), busy, last_used)


@pytest.mark.parametrize(
    ("prompt", "slots", "allocation"),
    [
        ([1, 2, 3], [slot([]), slot([])], SlotAllocation(0, 0, 0)),
        ([1, 2, 3], [slot([], busy=True), slot([])], SlotAllocation(1, 1, 0)),
        ([1, 2, 3], [slot([], busy=True)], None),
        ([1, 2, 3, 4], [slot([9, 9]), slot([1, 2, 3])], SlotAllocation(1, 1, 3)),  # in place
        ([1, 2, 3], [slot([1, 2, 3])], SlotAllocation(0, 0, 2)),  # the last token is computed for its logits
        ([1, 2, 3, 4], [slot([1, 2, 3, 5, 6], busy=True), slot([])], SlotAllocation(1, 0, 3)),  # copied from a busy one
        # A long cached sequence is not evicted for a short prefix, unless there is no other slot.
        ([1, 2, 9], [slot([1, 2, 3, 4, 5, 6, 7], last_used=2), slot([8], last_used=1)], SlotAllocation(1, 0, 2)),
        ([1, 2, 9], [slot([1, 2, 3, 4, 5, 6, 7])], SlotAllocation(0, 0, 2)),
        ([9, 9], [slot([1], last_used=7), slot([2], last_used=3)], SlotAllocation(1, 0, 0)),  # least recently used
        # Waits for a prompt in prefill if it has much in common with it.
        ([*range(60)], [slot([], after_prefill=[*range(60)], busy=True), slot([])], None),
        ([*range(20)], [slot([], after_prefill=[*range(20)], busy=True), slot([])], SlotAllocation(1, 1, 0)),
    ],
)
def test_slot_for_a_prompt(prompt: list[int], slots: list[Slot], allocation: SlotAllocation | None) -> None:
    assert allocate_slot(np.array(prompt), slots) == allocation


def test_tokens_computed_by_another_adapter_are_not_shared() -> None:
    cached = np.array([1, 2, 3])
    slots = [Slot(cached, cached, False, 0, "poet"), Slot(EMPTY, EMPTY, False, 0)]
    prompt = np.array([1, 2, 3, 4])
    assert allocate_slot(prompt, slots, "poet") == SlotAllocation(0, 0, 3)
    assert [allocate_slot(prompt, slots, other).num_cached_tokens for other in ("", "clerk")] == [0, 0]  # type: ignore[union-attr]
    long_prompt = np.arange(60)
    in_prefill = [Slot(EMPTY, long_prompt, True, 0, "poet"), Slot(EMPTY, EMPTY, False, 0)]
    assert allocate_slot(long_prompt, in_prefill, "poet") is None  # waits for the prefill of the same prompt
    assert allocate_slot(long_prompt, in_prefill, "clerk")


def test_common_prefix_len() -> None:
    assert common_prefix_len(np.array([1, 2, 3]), np.array([1, 2])) == 2
    assert common_prefix_len(np.array([1, 2, 3]), np.array([1, 5, 3])) == 1
    assert common_prefix_len(np.array([1]), EMPTY) == 0


@pytest.mark.parametrize(
    ("lengths", "cache_tokens", "max_positions", "shape"),
    [
        ([], 8192, 512, CacheShape(16, 512)),  # all slots have full length
        ([], 4096, 512, CacheShape(16, 256)),  # too little memory for that: equal parts
        ([10, 300], 4096, 512, CacheShape(12, 320)),  # a long sequence makes slots fewer
        ([512], 4096, 512, CacheShape(8, 512)),
        ([4000], 4096, 100_000, CacheShape(1, 4032)),
        ([4096], 4096, 100_000, CacheShape(1, 4096)),
        ([100], 64, 512, CacheShape(1, 64)),  # never more than the cache
    ],
)
def test_cache_shape(lengths: list[int], cache_tokens: int, max_positions: int, shape: CacheShape) -> None:
    assert cache_shape_for(lengths, 16, cache_tokens, max_positions) == shape


class RecordingStorage:
    """Notes the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def reshape(self, num_slots: int, capacity: int, keep: object = ()) -> None:
        self.calls.append(("reshape", num_slots, capacity, list(keep)))  # type: ignore[call-overload]

    def assign_slot(self, slot: int, source: int, num_tokens: int) -> None:
        self.calls.append(("assign", slot, source, num_tokens))


def compute(sequence: Sequence) -> Sequence:
    """Let all tokens of a sequence be in the cache."""
    sequence.num_computed_tokens = sequence.num_tokens
    return sequence


def test_manager_reuses_the_prefix_of_a_freed_slot() -> None:
    storage = RecordingStorage()
    manager = KVCacheManager(2, 256, 128, [storage])
    first, second = Sequence([1, 2, 3], 4), Sequence([9], 4)
    assert manager.allocate(first) == SlotAllocation(0, 0, 0)
    assert manager.allocate(second) == SlotAllocation(1, 1, 0)
    compute(first).tokens.append(7)  # its last token is not computed yet
    compute(second)
    assert (manager.num_used_tokens, manager.num_total_tokens) == (4, 256)
    assert manager.allocate(Sequence([5], 4)) is None
    manager.free(first, step=1)
    assert manager.num_used_tokens == 1
    third = Sequence([1, 2, 3, 8], 4)
    assert manager.allocate(third) == SlotAllocation(0, 0, 3)
    assert (third.slot, third.num_computed_tokens, third.num_cached_tokens) == (0, 3, 3)
    assert storage.calls == [("reshape", 2, 128, []), ("assign", 0, 0, 0), ("assign", 1, 1, 0), ("assign", 0, 0, 3)]


def test_manager_evicts_the_least_recently_used_slot() -> None:
    manager = KVCacheManager(2, 256, 128)
    for step, prompt in ((5, [1, 2, 3, 4]), (3, [6, 7, 8, 9])):
        sequence = Sequence(prompt, 4)
        assert manager.allocate(sequence)
        compute(sequence)
        manager.free(sequence, step)
    allocation = manager.allocate(Sequence([50, 51], 4))
    assert allocation
    assert (allocation.slot, allocation.num_cached_tokens) == (1, 0)


def test_manager_reshapes_the_cache_for_a_long_sequence_and_keeps_what_runs() -> None:
    storage = RecordingStorage()
    manager = KVCacheManager(4, 512, 512, [storage])
    finished, running = Sequence([1, 2], 4), Sequence([3, 4, 5], 4)
    assert manager.allocate(finished)
    assert manager.allocate(running) == SlotAllocation(1, 1, 0)
    manager.free(compute(finished), step=1)
    compute(running)
    long = Sequence([1, 2, 7], 197)
    assert manager.allocate(long) == SlotAllocation(1, 1, 0)  # the prefix [1, 2] is evicted
    assert (manager.shape, running.slot, long.slot) == (CacheShape(2, 256), 0, 1)
    assert ("reshape", 2, 256, [(1, 3)]) in storage.calls
    assert manager.allocate(Sequence([1], 511)) is None  # would leave no slot for those that run


def test_manager_without_prefix_caching_takes_any_free_slot() -> None:
    manager = KVCacheManager(2, 256, 128, prefix_caching=False)
    first = Sequence([1, 2, 3, 4], 4)
    assert manager.allocate(first)
    manager.free(compute(first), step=1)
    assert manager.allocate(Sequence([1, 2, 3, 4], 4)) == SlotAllocation(0, 0, 0)


def test_prompt_with_logprobs_is_computed_as_a_whole() -> None:
    manager = KVCacheManager(1, 128, 128)
    first = Sequence([1, 2, 3, 4], 4)
    assert manager.allocate(first)
    manager.free(compute(first), step=1)
    scored = Sequence([1, 2, 3, 4], 0, num_logprobs=0, needs_prompt_logprobs=True)
    assert manager.allocate(scored) == SlotAllocation(0, 0, 0)

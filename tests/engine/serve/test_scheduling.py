"""Decisions by tables: who is next, who gets which lane, what a step holds, how the cache is cut."""

from __future__ import annotations

import numpy as np
import pytest

from engine.serve.llm.scheduler import (
    CacheShape,
    FairQueue,
    Slot,
    SlotAllocation,
    allocate_slot,
    cache_shape_for,
    common_prefix_len,
    schedule_tokens,
)

EMPTY = np.zeros(0, dtype=np.int64)


def lane(tokens: list[int], coming: list[int] | None = None, busy: bool = False, used: int = 0) -> Slot:
    held = np.array(tokens, dtype=np.int64)
    return Slot(held, held if coming is None else np.array(coming), busy, used)


def take(queue: FairQueue[str], tokens: int) -> str:
    turn = queue.first()
    assert turn
    queue.start(turn[0], tokens)
    return turn[1]


def test_one_client_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abc":
        queue.push("", name)
    assert [take(queue, tokens) for tokens in (100, 1, 50)] == ["a", "b", "c"]
    assert queue.first() is None


def test_who_had_the_fewest_tokens_is_next() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("many", f"many{i}")
    assert take(queue, 100) == "many0"
    queue.push("few", "few0")  # starts level with many, who was charged 100
    queue.push("few", "few1")
    assert [take(queue, 10) for _ in range(4)] == ["many1", "few0", "many2", "few1"]
    queue.end("many", 100)  # its first wrote nothing
    assert take(queue, 10) == "many3"


def test_a_client_that_comes_back_has_saved_no_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a0")
    take(queue, 5)
    queue.end("a", 0)
    for i in range(3):
        queue.push("b", f"b{i}")
    take(queue, 1000)
    take(queue, 1000)
    queue.push("a", "a1")
    assert queue._charged == {"b": 2000, "a": 2000}


def test_what_is_removed_is_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("x1", "y1", "x2"):
        queue.push(name[0], name)
    assert sorted(queue.remove(lambda name: name[0] == "x")) == ["x1", "x2"]
    assert (len(queue), queue.first(), set(queue._charged)) == (1, ("y", "y1"), {"y"})


@pytest.mark.parametrize(
    ("pending", "budget", "dealt"),
    [
        ([1, 1, 1], 8, [1, 1, 1]),
        ([1, 30, 1], 8, [1, 6, 1]),  # who writes gets one, the reader what is left
        ([30, 30], 40, [30, 10]),  # the elder reads first
        ([1, 1, 1, 20, 5], 3, [1, 1, 1, 1, 0]),  # a reader comes to its end however many write
        ([3, 4], 100, [3, 4]),
    ],
)
def test_a_step_is_dealt(pending: list[int], budget: int, dealt: list[int]) -> None:
    assert schedule_tokens(pending, budget) == dealt


@pytest.mark.parametrize(
    ("prompt", "lanes", "found"),
    [
        ([1, 2, 3], [lane([]), lane([])], SlotAllocation(0, 0, 0)),
        ([1, 2, 3], [lane([], busy=True), lane([])], SlotAllocation(1, 1, 0)),
        ([1, 2, 3], [lane([], busy=True)], None),
        ([1, 2, 3, 4], [lane([9, 9]), lane([1, 2, 3])], SlotAllocation(1, 1, 3)),  # goes on where another ended
        ([1, 2, 3], [lane([1, 2, 3])], SlotAllocation(0, 0, 2)),  # the last token is read for its logits
        (
            [1, 2, 3, 4],
            [lane([1, 2, 3, 5, 6], busy=True), lane([])],
            SlotAllocation(1, 0, 3),
        ),  # copied from one that runs
        (
            [1, 2, 9],
            [lane([1, 2, 3, 4, 5, 6, 7], used=2), lane([8], used=1)],
            SlotAllocation(1, 0, 2),
        ),  # a long one is not given up
        ([1, 2, 9], [lane([1, 2, 3, 4, 5, 6, 7])], SlotAllocation(0, 0, 2)),  # but where there is no other
        ([9, 9], [lane([1], used=7), lane([2], used=3)], SlotAllocation(1, 1, 0)),  # the longest out of use
        ([*range(60)], [lane([], coming=[*range(60)], busy=True), lane([])], None),  # soon there is much to share
        (
            [*range(20)],
            [lane([], coming=[*range(20)], busy=True), lane([])],
            SlotAllocation(1, 1, 0),
        ),  # not worth waiting
    ],
)
def test_a_prompt_finds_its_lane(prompt: list[int], lanes: list[Slot], found: SlotAllocation | None) -> None:
    got = allocate_slot(np.array(prompt), lanes)
    if found and got and found.shared == 0:
        assert (got.lane, got.shared) == (found.lane, 0)
    else:
        assert got == found


def test_what_another_adapter_read_is_no_use() -> None:
    held = np.array([1, 2, 3])
    lanes = [Slot(held, held, False, 0, "poet"), Slot(EMPTY, EMPTY, False, 0)]
    prompt = np.array([1, 2, 3, 4])
    assert allocate_slot(prompt, lanes, "poet") == SlotAllocation(0, 0, 3)
    assert [allocate_slot(prompt, lanes, other).shared for other in ("", "clerk")] == [0, 0]  # type: ignore[union-attr]
    coming = np.arange(60)
    reads = [Slot(EMPTY, coming, True, 0, "poet"), Slot(EMPTY, EMPTY, False, 0)]
    assert allocate_slot(coming, reads, "poet") is None  # waits for the one that reads the same
    assert allocate_slot(coming, reads, "clerk")


def test_common_beginnings() -> None:
    assert common_prefix_len(np.array([1, 2, 3]), np.array([1, 2])) == 2
    assert common_prefix_len(np.array([1, 2, 3]), np.array([1, 5, 3])) == 1
    assert common_prefix_len(np.array([1]), EMPTY) == 0


@pytest.mark.parametrize(
    ("needs", "cache", "positions", "shape"),
    [
        ([], 8192, 512, CacheShape(16, 512)),  # all fit whole
        ([], 4096, 512, CacheShape(16, 256)),  # they don't: each gets an equal part
        ([10, 300], 4096, 512, CacheShape(12, 320)),  # a long one takes of the others
        ([512], 4096, 512, CacheShape(8, 512)),
        ([4000], 4096, 100_000, CacheShape(1, 4032)),
        ([4096], 4096, 100_000, CacheShape(1, 4096)),
        ([100], 64, 512, CacheShape(1, 64)),  # never more than the cache
    ],
)
def test_the_cache_is_cut(needs: list[int], cache: int, positions: int, shape: CacheShape) -> None:
    assert cache_shape_for(needs, 16, cache, positions) == shape

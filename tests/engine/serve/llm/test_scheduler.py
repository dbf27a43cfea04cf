"""Decisions without a model: which client is next, what is admitted, and what a step holds."""

from __future__ import annotations

import time
from collections.abc import Collection

import pytest

from engine.serve.llm.kv_cache import KVCacheManager
from engine.serve.llm.scheduler import EngineQueue, FairQueue, ScheduledSequence, Scheduler, schedule_tokens
from engine.serve.llm.sequence import QueueFull, Sequence


def take(queue: FairQueue[str], tokens: int) -> str:
    first = queue.first()
    assert first
    queue.start(first[0], tokens)
    return first[1]


def test_one_client_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abc":
        queue.push("", name)
    assert [take(queue, tokens) for tokens in (100, 1, 50)] == ["a", "b", "c"]
    assert queue.first() is None


def test_client_with_the_fewest_tokens_is_next() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("many", f"many{i}")
    assert take(queue, 100) == "many0"
    queue.push("few", "few0")  # starts level with many, who was charged 100
    queue.push("few", "few1")
    assert [take(queue, 10) for _ in range(4)] == ["many1", "few0", "many2", "few1"]
    queue.finish("many", 100)  # its first item used nothing
    assert take(queue, 10) == "many3"


def test_client_that_comes_back_has_earned_no_credit() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a0")
    take(queue, 5)
    queue.finish("a", 0)
    for i in range(3):
        queue.push("b", f"b{i}")
    take(queue, 1000)
    take(queue, 1000)
    queue.push("a", "a1")
    assert queue._charged == {"b": 2000, "a": 2000}


def test_removed_items_leave_no_trace() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("x1", "y1", "x2"):
        queue.push(name[0], name)
    assert sorted(queue.remove(lambda name: name[0] == "x")) == ["x1", "x2"]
    assert (len(queue), queue.first(), set(queue._charged)) == (1, ("y", "y1"), {"y"})


@pytest.mark.parametrize(
    ("pending", "budget", "counts"),
    [
        ([1, 1, 1], 8, [1, 1, 1]),
        ([1, 30, 1], 8, [1, 6, 1]),  # decode gets one token each, prefill the rest
        ([30, 30], 40, [30, 10]),  # the older prompt first
        ([1, 1, 1, 20, 5], 3, [1, 1, 1, 1, 0]),  # prefill makes progress however many decode
        ([3, 4], 100, [3, 4]),
    ],
)
def test_tokens_of_a_step(pending: list[int], budget: int, counts: list[int]) -> None:
    assert schedule_tokens(pending, budget) == counts


class Adapters:
    """Adapters in memory, with room for some."""

    def __init__(self, *loaded: str, max_loaded: int = 1) -> None:
        self.loaded, self.max_loaded = loaded, max_loaded

    def has_room(self, in_use: Collection[str]) -> bool:
        return len(set(in_use) - {""}) < self.max_loaded


def make_scheduler(num_slots: int = 2, adapters: Adapters | None = None, budget: int = 8) -> tuple[Scheduler, list[Sequence]]:  # fmt: skip
    """Return a scheduler, and the list to which its outputs are reported."""
    outputs: list[Sequence] = []
    kv_cache = KVCacheManager(num_slots, 128 * num_slots, 128)
    return Scheduler(EngineQueue(4, outputs.extend), kv_cache, adapters or Adapters(), budget), outputs


def run_step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """Schedule a step and let it have run; return (slot, tokens, logits) of each sequence."""
    batch = scheduler.schedule({})
    for sequence, inputs in batch:
        sequence.num_computed_tokens += len(inputs.tokens)
        if not sequence.num_pending_tokens:
            sequence.tokens.append(7)
    return [(inputs.slot, len(inputs.tokens), inputs.num_logits) for _, inputs in batch]


def test_prompts_are_computed_in_chunks_beside_decode() -> None:
    scheduler, _ = make_scheduler()
    scheduler.queue.add([Sequence([1, 2], 5)], 128)
    assert scheduler.admit() == ""
    assert run_step(scheduler) == [(0, 2, 1)]
    scheduler.queue.add([Sequence(list(range(20, 30)), 5)], 128)
    assert scheduler.admit() == ""
    assert [run_step(scheduler) for _ in range(3)] == [
        [(0, 1, 1), (1, 7, 0)],
        [(0, 1, 1), (1, 3, 1)],
        [(0, 1, 1), (1, 1, 1)],
    ]


def test_draft_tokens_follow_a_sequences_last_token() -> None:
    scheduler, _ = make_scheduler()
    sequence = Sequence([1, 2], 5)
    scheduler.queue.add([sequence], 128)
    scheduler.admit()
    run_step(scheduler)
    assert scheduler.schedule({sequence: [8, 9]}) == [(sequence, ScheduledSequence(0, 2, [7, 8, 9], 3))]


def test_sequence_waits_for_a_slot_until_another_is_finished() -> None:
    scheduler, outputs = make_scheduler(num_slots=1)
    first, second = Sequence([1, 2], 5), Sequence([3], 5)
    scheduler.queue.add([first, second], 128)
    scheduler.admit()
    assert scheduler.running == [first]
    run_step(scheduler)
    scheduler.finish(first, "stop")
    scheduler.admit()
    assert scheduler.running == [second]
    scheduler.queue.flush_outputs()
    assert outputs == [first]
    assert (first.finish_reason, first.error, second.finish_reason) == ("stop", "", None)
    assert first.queued_at <= first.scheduled_at <= first.finished_at


def test_first_in_the_queue_waits_for_its_adapter() -> None:
    scheduler, _ = make_scheduler(adapters=Adapters("poet"))
    scheduler.queue.add([Sequence([1], 5, adapter="poet"), Sequence([2], 5, adapter="clerk")], 128)
    assert scheduler.admit() == ""  # the other adapter is in use
    assert scheduler.adapters_in_use == {"poet"}
    scheduler.finish(scheduler.running[0], "stop")
    assert scheduler.admit() == "clerk"
    assert not scheduler.running


def test_aborted_sequence_frees_its_slot() -> None:
    scheduler, outputs = make_scheduler(num_slots=1)
    running, waiting, following = Sequence([1], 5), Sequence([2], 5), Sequence([3], 5)
    scheduler.queue.add([running, waiting, following], 128)
    scheduler.admit()
    scheduler.queue.abort([running, waiting])
    scheduler.drop_aborted()
    scheduler.queue.flush_outputs()
    assert {sequence: sequence.finish_reason for sequence in outputs} == {running: "abort", waiting: "expired"}
    scheduler.admit()
    assert scheduler.running == [following]


def test_sequence_past_its_deadline_is_dropped_from_the_queue() -> None:
    scheduler, outputs = make_scheduler(num_slots=1)
    expired, waiting = Sequence([1], 5, deadline=time.monotonic() - 1), Sequence([2], 5)
    scheduler.queue.add([expired, waiting], 128)
    scheduler.drop_aborted()
    scheduler.queue.flush_outputs()
    assert (outputs, expired.finish_reason, len(scheduler.queue)) == ([expired], "expired", 1)


def test_queue_takes_all_sequences_of_a_request_or_none() -> None:
    scheduler, _ = make_scheduler()
    scheduler.queue.add([Sequence([1], 5) for _ in range(3)], 128)
    with pytest.raises(QueueFull):
        scheduler.queue.add([Sequence([1], 5) for _ in range(2)], 128)
    with pytest.raises(ValueError, match="128 tokens"):
        scheduler.queue.add([Sequence([1], 5), Sequence([1], 128)], 128)
    assert len(scheduler.queue) == 3

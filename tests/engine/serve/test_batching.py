"""Batches form while others are processed, and no input waits for a batch to fill."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine.serve.batching import DynamicBatcher


class Slow:
    """Doubles numbers, and records its batches; it waits until a test resumes it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.resume = threading.Event()

    def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        self.resume.wait(120)
        if 13 in numbers:
            raise ValueError("thirteen")
        return [2 * number for number in numbers]


def test_inputs_that_come_during_a_batch_share_the_next_one() -> None:
    slow = Slow()

    async def submit() -> list[list[int]]:
        batcher = DynamicBatcher(slow, 4)
        first = asyncio.create_task(batcher([1]))
        while not slow.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher([10 * i, 10 * i + 1])) for i in range(1, 4)]
        cancelled = asyncio.create_task(batcher([99]))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        slow.resume.set()
        return [await first, *[await other for other in others]]

    assert asyncio.run(submit()) == [[2], [20, 22], [40, 42], [60, 62]]
    assert slow.batches == [[1], [10, 11, 20, 21], [30, 31]]


def test_error_reaches_only_its_own_batch() -> None:
    slow = Slow()
    slow.resume.set()

    async def submit() -> None:
        batcher = DynamicBatcher(slow, 2)
        with pytest.raises(ValueError, match="thirteen"):
            await batcher([13, 1])
        assert await batcher([2]) == [4]

    asyncio.run(submit())


def test_single_input_is_processed_at_once_unless_asked_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, waits, sleep = Slow(), list[float](), asyncio.sleep
    slow.resume.set()

    async def record_sleep(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("engine.serve.batching.asyncio.sleep", record_sleep)

    async def submit(wait_s: float) -> None:
        batcher = DynamicBatcher(slow, 16, wait_s)
        await asyncio.gather(batcher([1]), batcher([2]))

    asyncio.run(submit(0.0))
    asyncio.run(submit(0.2))
    assert waits == [0.0, 0.2]
    assert slow.batches == [[1, 2], [1, 2]]

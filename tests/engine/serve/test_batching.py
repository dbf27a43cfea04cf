"""Batches form while others are answered, and nobody waits for company."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine.serve.batching import DynamicBatcher


class Slow:
    """Doubles numbers, and keeps its batches; the first waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        self.go.wait(120)
        if 13 in numbers:
            raise ValueError("thirteen")
        return [2 * number for number in numbers]


def test_those_that_come_meanwhile_share_the_next() -> None:
    slow = Slow()

    async def ask() -> list[list[int]]:
        together = DynamicBatcher(slow, 4)
        first = asyncio.create_task(together([1]))
        while not slow.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(together([10 * i, 10 * i + 1])) for i in range(1, 4)]
        left = asyncio.create_task(together([99]))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        slow.go.set()
        return [await first, *[await other for other in others]]

    assert asyncio.run(ask()) == [[2], [20, 22], [40, 42], [60, 62]]
    assert slow.batches == [[1], [10, 11, 20, 21], [30, 31]]


def test_an_error_is_that_of_its_batch() -> None:
    slow = Slow()
    slow.go.set()

    async def ask() -> None:
        together = DynamicBatcher(slow, 2)
        with pytest.raises(ValueError, match="thirteen"):
            await together([13, 1])
        assert await together([2]) == [4]

    asyncio.run(ask())


def test_alone_an_input_is_answered_at_once_unless_it_is_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, waits, sleep = Slow(), list[float](), asyncio.sleep
    slow.go.set()

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("engine.serve.batching.asyncio.sleep", noted)

    async def ask(wait_s: float) -> None:
        together = DynamicBatcher(slow, 16, wait_s)
        await asyncio.gather(together([1]), together([2]))

    asyncio.run(ask(0.0))
    asyncio.run(ask(0.2))
    assert waits == [0.0, 0.2]
    assert slow.batches == [[1, 2], [1, 2]]

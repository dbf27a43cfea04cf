"""Inputs of several requests in one forward, without anybody waiting for company.

Those that come while a forward runs share the next one: alone, an input is answered at once; under load, batches grow by
themselves. Serve's own `batch` cuts its batches before the one that runs has ended, and so must wait for each to fill.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Generic, TypeVar

Input = TypeVar("Input")
Answer = TypeVar("Answer")


class DynamicBatcher(Generic[Input, Answer]):
    """Answers inputs by a function of batches, in a thread, one batch at a time."""

    def __init__(
        self,
        answer: Callable[[list[Input]], Sequence[Answer]],
        most: int,
        wait_s: float = 0.0,
        thread: Executor | None = None,
    ) -> None:
        """Take up to `most` inputs into a batch; `wait_s`: seconds that the first of an idle time waits for others.

        `thread`: where to answer; of those that a process has there should be one (see `passing`). None: one of its own.
        """
        self.answer, self.most, self.wait_s = answer, most, wait_s
        self.thread = thread or ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Input, asyncio.Future[Answer]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, given: Sequence[Input]) -> list[Answer]:
        """Return the answers of a request's inputs. Raises what the function raised for a batch that one of them was in."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in given]
        self._waiting.extend(zip(given, futures, strict=True))
        if self._running is None:
            self._running = loop.create_task(self._run())
        return list(await asyncio.gather(*futures))

    async def _run(self) -> None:
        try:
            await asyncio.sleep(self.wait_s)
            while batch := self._next():
                await self._answer(batch)
        finally:
            self._running = None

    def _next(self) -> list[tuple[Input, asyncio.Future[Answer]]]:
        """Take the eldest inputs, but for those whose client has left."""
        batch: list[tuple[Input, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self.most:
            item = self._waiting.popleft()
            if not item[1].done():
                batch.append(item)
        return batch

    async def _answer(self, batch: list[tuple[Input, asyncio.Future[Answer]]]) -> None:
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self.thread, self.answer, [given for given, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

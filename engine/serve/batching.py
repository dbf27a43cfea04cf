"""Dynamic batching: inputs of several requests in one forward, without waiting for a batch to fill.

Inputs that come while a forward runs share the next one: a single input is processed at once, and under load batches
grow. Serve's own `batch` forms the next batch before the running one has ended, and so has to wait for each to fill.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


class DynamicBatcher(Generic[Input, Output]):
    """Processes inputs by a function of batches, in a thread, one batch at a time."""

    def __init__(
        self,
        process: Callable[[list[Input]], Sequence[Output]],
        max_batch_size: int,
        wait_s: float = 0.0,
        executor: Executor | None = None,
    ) -> None:
        """Take up to `max_batch_size` inputs into a batch; the first after an idle time waits `wait_s` for others.

        `executor`: where `process` runs; a process should have one thread for all (see `short_lived_thread`). None: a
        thread of its own.
        """
        self.process, self.max_batch_size, self.wait_s = process, max_batch_size, wait_s
        self.executor = executor or ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Input, asyncio.Future[Output]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, inputs: Sequence[Input]) -> list[Output]:
        """Return the outputs of a request's inputs. Raises what `process` raised for a batch with one of them."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Output]] = [loop.create_future() for _ in inputs]
        self._waiting.extend(zip(inputs, futures, strict=True))
        if self._running is None:
            self._running = loop.create_task(self._run())
        return list(await asyncio.gather(*futures))

    async def _run(self) -> None:
        try:
            await asyncio.sleep(self.wait_s)
            while batch := self._next_batch():
                await self._process(batch)
        finally:
            self._running = None

    def _next_batch(self) -> list[tuple[Input, asyncio.Future[Output]]]:
        """Take the oldest inputs, without those whose request was cancelled."""
        batch: list[tuple[Input, asyncio.Future[Output]]] = []
        while self._waiting and len(batch) < self.max_batch_size:
            item = self._waiting.popleft()
            if not item[1].done():
                batch.append(item)
        return batch

    async def _process(self, batch: list[tuple[Input, asyncio.Future[Output]]]) -> None:
        try:
            loop = asyncio.get_running_loop()
            outputs = await loop.run_in_executor(self.executor, self.process, [given for given, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), output in zip(batch, outputs, strict=True):
            if not future.done():
                future.set_result(output)

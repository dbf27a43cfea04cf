"""Map a function over items: in this process, in other processes of this machine, or by the Ray cluster.

`map_serially`, `map_over_processes` and `map_over_ray` take the same arguments and give the same results, each as soon as
it is done: `local(item)`, or `remote(to_message(item))` in another process; `remote`, the message and the result are pickled.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol, TypeVar

from engine.errors import TransientError, UserError

Item = TypeVar("Item")
Message = TypeVar("Message")
Result = TypeVar("Result")

PROCESS_START_S = 2.0  # seconds of work that a process costs before its first result: its imports, its encoder


class ParallelMap(Protocol):
    """One of the three functions below; `sizes` say how much work each item is, in any unit."""

    def __call__(  # noqa: D102
        self, local: Callable[[Item], Result], to_message: Callable[[Item], Message], remote: Callable[[Message], Result],
        items: Sequence[Item], sizes: Sequence[float],
    ) -> Generator[Result, None, None]: ...  # fmt: skip


def is_connected_to_ray() -> bool:
    """Return whether this process is connected to Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_serially(
    local: Callable[[Item], Result], to_message: Callable[[Item], Message], remote: Callable[[Message], Result],
    items: Sequence[Item], sizes: Sequence[float],
) -> Generator[Result, None, None]:  # fmt: skip
    """Process all items in this process, one after the other."""
    yield from map(local, items)


def map_over_processes(
    local: Callable[[Item], Result], to_message: Callable[[Item], Message], remote: Callable[[Message], Result],
    items: Sequence[Item], sizes: Sequence[float],
) -> Generator[Result, None, None]:  # fmt: skip
    """Process items in this process and, once that is sure to save time, in one process for each core.

    Whether it saves time is estimated from the time that the items so far took and the sizes of the remaining ones. No
    process outlives this one.
    """
    start, done = time.monotonic(), 0.0
    for i, item in enumerate(items):
        count = min(num_cores(), len(items) - i)
        remaining_s = (time.monotonic() - start) * sum(sizes[i:]) / max(done, 1.0)
        if i and count > 1 and remaining_s * (1 - 1 / count) > PROCESS_START_S:
            yield from _map_by_workers(to_message, remote, items[i:], count)
            return
        yield local(item)
        done += sizes[i]


def map_over_ray(
    local: Callable[[Item], Result], to_message: Callable[[Item], Message], remote: Callable[[Message], Result],
    items: Sequence[Item], sizes: Sequence[float],
) -> Generator[Result, None, None]:  # fmt: skip
    """Process items by the cluster, one item a task of Ray Data. A UserError is raised as it is, others as Ray wraps them."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    path = list(sys.path)

    def run(row: dict[str, Any]) -> dict[str, Any]:
        sys.path[:] = [*dict.fromkeys([*sys.path, *path])]  # a user's filter may be in the working directory
        try:
            return {"response": pickle.dumps((remote(row["item"]), None), pickle.HIGHEST_PROTOCOL)}
        except UserError as error:
            return {"response": pickle.dumps((None, error))}

    messages = [{"item": to_message(item)} for item in items]
    if not messages:
        return
    for row in ray.data.from_items(messages, override_num_blocks=len(messages)).map(run).iter_rows():
        result, error = pickle.loads(row["response"])
        if error is not None:
            raise error
        yield result


def _map_by_workers(
    to_message: Callable[[Item], Message], remote: Callable[[Message], Result], items: Sequence[Item], count: int
) -> Generator[Result, None, None]:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = os.environ | {"PYTHONPATH": path, "RAYON_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "engine.data.parallel_map"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True,  # Ctrl-C goes to this process, which then ends them
        )
        for _ in range(count)
    ]  # fmt: skip
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def call(item: Item) -> Any:
        process = idle.get()
        assert process.stdin
        assert process.stdout
        try:
            pickle.dump((remote, to_message(item)), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            result, error = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as broken:
            raise TransientError(
                "a process that prepared data was killed (is there too little memory?): give the same command again, "
                "with a smaller data.shard_tokens if need be"
            ) from broken
        finally:
            idle.put(process)
        if error is not None:
            raise error
        return result

    threads = ThreadPoolExecutor(count)
    try:
        for future in as_completed([threads.submit(call, item) for item in items]):
            yield future.result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _run_worker() -> None:
    """Run as a worker process: respond to calls on standard input until it is closed."""
    calls, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with responses
    while True:
        try:
            remote, message = pickle.load(calls)
        except EOFError:
            return
        try:
            response: Any = remote(message), None
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())
            response = None, error
        pickle.dump(response, responses, pickle.HIGHEST_PROTOCOL)
        responses.flush()


if __name__ == "__main__":
    _run_worker()

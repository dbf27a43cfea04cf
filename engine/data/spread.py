"""Work over many items: here, by other processes of this machine, or by the cluster that this process is connected to.

`alone`, `over_processes` and `over_cluster` are called alike and give the same results, each as it comes: `here(item)`, or
`away(send(item))` by another process, to which `away` and what is sent go by pickle, and the result comes back so.
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

from engine.errors import TryAgain, UserError

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")

START_S = 2.0  # seconds of work that a process costs before its first result: its imports, its encoder


class Spread(Protocol):
    """One of the three below; `sizes` say how much work each item is, in any unit."""

    def __call__(  # noqa: D102
        self, here: Callable[[T], R], send: Callable[[T], S], away: Callable[[S], R], items: Sequence[T], sizes: Sequence[float]
    ) -> Generator[R, None, None]: ...  # fmt: skip


def connected() -> bool:
    """Say whether this process is connected to Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def alone(
    here: Callable[[T], R], send: Callable[[T], S], away: Callable[[S], R], items: Sequence[T], sizes: Sequence[float]
) -> Generator[R, None, None]:
    """Do it all here."""
    yield from map(here, items)


def over_processes(
    here: Callable[[T], R], send: Callable[[T], S], away: Callable[[S], R], items: Sequence[T], sizes: Sequence[float]
) -> Generator[R, None, None]:
    """Do it here and, once that is sure to save time, by a process for each core; none of them outlives this one.

    Whether it does is judged by the time that the items so far took, and by the sizes of those that are left.
    """
    began, done = time.monotonic(), 0.0
    for i, item in enumerate(items):
        count = min(cores(), len(items) - i)
        left_s = (time.monotonic() - began) * sum(sizes[i:]) / max(done, 1.0)
        if i and count > 1 and left_s * (1 - 1 / count) > START_S:
            yield from _by_processes(send, away, items[i:], count)
            return
        yield here(item)
        done += sizes[i]


def over_cluster(
    here: Callable[[T], R], send: Callable[[T], S], away: Callable[[S], R], items: Sequence[T], sizes: Sequence[float]
) -> Generator[R, None, None]:
    """Do it by the cluster's processes, one item a task of Ray Data. Of what they raise, only UserError is raised here as it was."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    path = list(sys.path)

    def work(row: dict[str, Any]) -> dict[str, Any]:
        sys.path[:] = [*dict.fromkeys([*sys.path, *path])]  # a filter may lie in the folder of the command
        try:
            return {"answer": pickle.dumps((away(row["item"]), None), pickle.HIGHEST_PROTOCOL)}
        except UserError as error:
            return {"answer": pickle.dumps((None, error))}

    sent = [{"item": send(item)} for item in items]
    if not sent:
        return
    for row in ray.data.from_items(sent, override_num_blocks=len(sent)).map(work).iter_rows():
        result, error = pickle.loads(row["answer"])
        if error is not None:
            raise error
        yield result


def _by_processes(
    send: Callable[[T], S], away: Callable[[S], R], items: Sequence[T], count: int
) -> Generator[R, None, None]:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = os.environ | {"PYTHONPATH": path, "RAYON_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "engine.data.spread"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends them
        )
        for _ in range(count)
    ]  # fmt: skip
    free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for process in started:
        free.put(process)

    def ask(item: T) -> Any:
        process = free.get()
        assert process.stdin
        assert process.stdout
        try:
            pickle.dump((away, send(item)), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            result, error = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as gone:
            raise TryAgain(
                "a process that prepared data was killed (is there too little memory?): give the same command again, "
                "with a smaller data.shard_tokens if need be"
            ) from gone
        finally:
            free.put(process)
        if error is not None:
            raise error
        return result

    threads = ThreadPoolExecutor(count)
    try:
        for future in as_completed([threads.submit(ask, item) for item in items]):
            yield future.result()
    finally:
        for process in started:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in started:
            process.communicate()


def _serve() -> None:
    """Be one of those processes: answer what is asked, until there is nobody to ask."""
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            away, item = pickle.load(asked)
        except EOFError:
            return
        try:
            answer: Any = away(item), None
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())
            answer = None, error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve()

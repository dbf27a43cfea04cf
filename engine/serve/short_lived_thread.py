"""Work with tensors in a thread that ends with it.

libgomp gives each thread that runs a product on several cores a team of its own, for as long as that thread lives, and
lets no team's threads spin while all teams together have more threads than there are cores (`gomp_managed_threads` in its
wait policy). Each product then wakes its team by the kernel, and a step of a small model takes up to twice as long. So
what a process does but once, such as to load and try a model, is done in passing, and one thread is left that computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def run_in_short_lived_thread(work: Callable[[], Result]) -> Result:
    """Return what `work` returns, or raise what it raises; its team of threads is gone then."""
    with ThreadPoolExecutor(1, thread_name_prefix="passing") as thread:
        return thread.submit(work).result()

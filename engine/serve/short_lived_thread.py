"""Runs work with tensors in a thread that ends with it, so that one thread of the process computes at full speed.

libgomp gives each thread that runs a multi-core product a team of its own, for as long as that thread lives, and lets no
team's threads spin while all teams together have more threads than there are cores (`gomp_managed_threads` in its wait
policy). Each product then wakes its team through the kernel, and a step of a small model takes up to twice as long. So
what a process does once, such as loading and checking a model, runs in a short-lived thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def run_in_short_lived_thread(work: Callable[[], Result]) -> Result:
    """Return what `work` returns, or raise what it raises; its thread, and that thread's team, have ended then."""
    with ThreadPoolExecutor(1, thread_name_prefix="short-lived") as thread:
        return thread.submit(work).result()

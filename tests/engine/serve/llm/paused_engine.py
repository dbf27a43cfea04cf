"""An engine that pauses while a test looks at it, so that no test depends on its speed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.serve.llm.engine import TransformersEngine


@contextmanager
def paused(engine: TransformersEngine, after: int = 0) -> Iterator[None]:
    """Let an engine run `after` more forwards, and pause before the next one until the block ends."""
    runner: Any = engine.runner
    run, resume, left = runner.run, threading.Event(), after

    def run_or_wait(batch: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            assert resume.wait(120)
        return run(batch)

    runner.run = run_or_wait
    try:
        yield
    finally:
        runner.run = run
        resume.set()

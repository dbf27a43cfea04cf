"""A generator that stands still while a test looks at it, so that no test depends on how fast it writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.serve.llm.engine import TransformersEngine


@contextmanager
def held(generator: TransformersEngine, after: int = 0) -> Iterator[None]:
    """Let a generator come to a forward, the next one or that after some more, and no further until the block's end."""
    forward: Any = generator.forward
    run, go, left = forward.run, threading.Event(), after

    def wait(parts: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            assert go.wait(120)
        return run(parts)

    forward.run = wait
    try:
        yield
    finally:
        forward.run = run
        go.set()

"""One function over many parts: here, or by Ray Data on the cluster that this process is connected to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from engine.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def connected() -> bool:
    """Say whether this process is connected to Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def spread(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield the result of each item as it comes, in any order, worked out by the cluster's processes, one item a task.

    Raises the UserError that the function raises.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    path = list(sys.path)

    def work(row: dict[str, Any]) -> dict[str, Any]:
        sys.path[:] = [*dict.fromkeys([*sys.path, *path])]  # a filter may lie in the folder of the command
        try:
            return {"result": function(row["item"]), "mistake": ""}
        except UserError as error:
            return {"result": None, "mistake": str(error)}

    rows = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items)).map(work)
    for row in rows.iter_rows():
        if row["mistake"]:
            raise UserError(row["mistake"])
        yield row["result"]

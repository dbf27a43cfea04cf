"""Grid search: every combination of the listed values, once."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import Config
from engine.sweep.list_searcher import ListSearcher
from engine.sweep.search_space import SearchSpace, grid_params

HAS_SEVERAL_METRICS = True
NEEDS_LISTED_VALUES = True
TAKES_GRID = True


def make(
    space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str], rungs: Sequence[int]
) -> ListSearcher:
    """Return the searcher."""
    return ListSearcher(grid_params(space, config))

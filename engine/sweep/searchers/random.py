"""Random search (Bergstra & Bengio 2012), with every combination of the grid values for each sample."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import Config
from engine.sweep.list_searcher import ListSearcher
from engine.sweep.search_space import SearchSpace, random_params

HAS_SEVERAL_METRICS = True
TAKES_GRID = True


def make(
    space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str], rungs: Sequence[int]
) -> ListSearcher:
    """Return the searcher."""
    return ListSearcher(random_params(space, config, config.seed))

"""Searchers, which choose the params of a trial. Each is one module here, named as in `sweep.searcher`.

A module has `make(space, config, metrics, modes, rungs)`, which returns a `Searcher`, and may declare by constants, which
`engine.config` reads without importing it:

    REQUIRED_SCHEDULER        the sweep.scheduler that it needs
    HAS_SEVERAL_METRICS       whether it takes several metrics (default: no)
    NEEDS_LISTED_VALUES       whether each domain must list its values (default: no)
    TAKES_GRID                whether a domain may be a grid, each value of which is tried (default: no)

A searcher has no state besides the trials' records, so that a sweep can resume after a kill.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from engine.config import Config
from engine.sweep.search_space import SearchSpace
from engine.sweep.trial_record import Trial


class Searcher(Protocol):
    """Chooses the params of each trial."""

    def __len__(self) -> int:
        """Return the number of trials."""

    def suggest_params(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Return the params of trial `index`, given the records of the trials so far."""


def make_searcher(
    space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str], rungs: Sequence[int]
) -> Searcher:
    """Return the searcher of sweep.searcher; `rungs` are the steps at which the scheduler compares trials."""
    module = importlib.import_module(f"{__name__}.{config.sweep.searcher}")
    searcher: Searcher = module.make(space, config, metrics, modes, rungs)
    return searcher

"""A searcher whose params are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.sweep.trial_record import Trial


class ListSearcher:
    """Params that are known beforehand: random samples or grid combinations."""

    def __init__(self, params: list[dict[str, Any]]) -> None:
        """Suggest these params, by trial index."""
        self._params = params

    def __len__(self) -> int:
        """Return the number of trials."""
        return len(self._params)

    def suggest_params(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Return the params of trial `index`."""
        return self._params[index]

"""How a model does by group: the metrics of each, and how far it is from all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluate.bootstrap import Interval, Summarize, unpaired_differences, bootstrap_intervals, select
from engine.objectives.contract import Scores

MAX_GROUPS = 50


@dataclass(frozen=True)
class Slice:
    """One group's examples, metrics, and the metrics' gaps to those of all other groups together."""

    group: str
    examples: int
    metrics: dict[str, Interval]
    gaps: dict[str, Interval]  # this group minus the others

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "group": self.group,
            "examples": self.examples,
            "metrics": {name: value.to_dict() for name, value in self.metrics.items()},
            "gaps": {name: value.to_dict() for name, value in self.gaps.items()},
        }


def evaluate_slices(
    summarize: Summarize, scores: Scores, groups: Sequence[str], confidence: float, resamples: int, seed: int
) -> list[Slice]:
    """Measure each group, the largest first. Raises UserError for a column that doesn't name groups."""
    names, sizes = np.unique(np.array(groups), return_counts=True)
    if not 2 <= len(names) <= MAX_GROUPS:
        raise UserError(
            f"evaluate.slice_column has {len(names):,} different values and groups need 2 to {MAX_GROUPS}: name another column"
        )
    found = []
    for name in names[np.argsort(-sizes, kind="stable")]:
        inside = np.array(groups) == name
        own, others = select(scores, inside), select(scores, ~inside)
        found.append(
            Slice(
                str(name), int(inside.sum()), bootstrap_intervals(summarize, own, confidence, resamples, seed),
                unpaired_differences(summarize, own, others, confidence, resamples, seed),
            )
        )  # fmt: skip
    return found

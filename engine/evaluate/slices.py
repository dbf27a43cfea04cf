"""Metrics by group of examples, and their differences from those of all other groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.evaluate.bootstrap import Interval, Summarize, bootstrap_intervals, select, unpaired_differences
from engine.objectives.contract import Scores

MAX_GROUPS = 50


@dataclass(frozen=True)
class Slice:
    """The metrics of one group, and their differences from those of all other groups together."""

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
    """Evaluate each group, largest first. Raises UserError for a column with too many or too few different values."""
    names, sizes = np.unique(np.array(groups), return_counts=True)
    if not 2 <= len(names) <= MAX_GROUPS:
        raise UserError(
            f"evaluate.slice_column has {len(names):,} different values, and 2 to {MAX_GROUPS} are supported: use another column"
        )
    slices = []
    for name in names[np.argsort(-sizes, kind="stable")]:
        is_member = np.array(groups) == name
        members, others = select(scores, is_member), select(scores, ~is_member)
        slices.append(
            Slice(
                group=str(name),
                examples=int(is_member.sum()),
                metrics=bootstrap_intervals(summarize, members, confidence, resamples, seed),
                gaps=unpaired_differences(summarize, members, others, confidence, resamples, seed),
            )
        )
    return slices

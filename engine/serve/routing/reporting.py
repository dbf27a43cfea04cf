"""What a router has seen of each version, until the controller takes it."""

from __future__ import annotations

from typing import TypeVar

from engine.serve.routing.messages import Report, ShadowComparison
from engine.serve.routing.sequential_test import Outcome

MAX_UNREPORTED = 20_000  # outcomes of a version, kept while the controller is away

T = TypeVar("T")


class Reporter:
    """Collects outcomes, comparisons and ratings."""

    def __init__(self) -> None:
        self._report = Report()

    def add_outcome(self, version: str, outcome: Outcome) -> None:
        """Add how a request to a version ended."""
        outcomes = self._report.outcomes.setdefault(version, [])
        if len(outcomes) < MAX_UNREPORTED:
            outcomes.append(outcome)

    def add_comparison(self, version: str, comparison: ShadowComparison) -> None:
        """Add the comparison of a shadow's answer."""
        self._report.comparisons.setdefault(version, []).append(comparison)

    def add_rating(self, version: str, is_bad: bool) -> None:
        """Add a client's rating of an answer."""
        self._report.ratings.setdefault(version, []).append(is_bad)

    def take(self) -> Report:
        """Return everything since the last call."""
        report, self._report = self._report, Report()
        return report

    def put_back(self, report: Report) -> None:
        """Keep a report that did not reach the controller for the next one."""
        _prepend(report.outcomes, self._report.outcomes)
        _prepend(report.comparisons, self._report.comparisons)
        _prepend(report.ratings, self._report.ratings)


def _prepend(earlier: dict[str, list[T]], later: dict[str, list[T]]) -> None:
    for version, entries in earlier.items():
        later[version] = [*entries, *later.get(version, ())][-MAX_UNREPORTED:]

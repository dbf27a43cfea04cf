"""What a router keeps for the controller, and how much."""

from __future__ import annotations

import pytest

from engine.serve.routing import reporting
from engine.serve.routing.messages import Report
from engine.serve.routing.reporting import Reporter
from engine.serve.routing.sequential_test import Outcome


def test_report_is_taken_once() -> None:
    reporter = Reporter()
    reporter.add_rating("a", True)
    assert reporter.take() == Report(ratings={"a": [True]})
    assert reporter.take() == Report()


def test_outcomes_are_bounded_while_the_controller_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "MAX_UNREPORTED", 3)
    reporter = Reporter()
    for latency_s in (1.0, 2.0, 3.0, 4.0):
        reporter.add_outcome("a", Outcome(False, latency_s))
    report = reporter.take()
    assert [outcome.latency_s for outcome in report.outcomes["a"]] == [1.0, 2.0, 3.0]
    reporter.add_outcome("a", Outcome(False, 5.0))
    reporter.put_back(report)
    assert [outcome.latency_s for outcome in reporter.take().outcomes["a"]] == [2.0, 3.0, 5.0]

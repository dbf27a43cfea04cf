"""The progress table of a sweep, on a terminal and without one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engine.sweep import progress_table as module
from engine.sweep.progress_table import ProgressTable
from engine.sweep.trial_record import Trial

TRIALS = [
    Trial(0, "s-000", {"optim.lr": 1e-3}, 6, 6, 0.5, state="finished"),
    Trial(1, "s-001", {"optim.lr": 1e-1}, 6, 0, None, state="failed", reason="step 1: no number"),
    Trial(2, "s-002", {"optim.lr": 1e-2}, 6, 6, 0.7, state="finished"),
    Trial(3, "s-003", {"optim.beta1": 0.8}, 6, 3, 0.6),
]


def test_without_a_terminal_each_trial_that_is_over_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=output, width=200))
    with ProgressTable(5, 6, "accuracy", "max") as table:
        table.show(TRIALS[:1])
        table.show(TRIALS)
        table.show(TRIALS)
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert "s-000 finished at step 6, accuracy 0.5, optim.lr=0.001" in lines[0]
    assert "no number" in lines[1]
    assert "best 0.7 by s-002, 3 of 5 over" in lines[2]


def test_a_terminal_shows_a_table_with_running_trials_first() -> None:
    table = ProgressTable(5, 6, "accuracy", "max")
    with table:
        table.show([])
        rendered = table.render(TRIALS)
    output = io.StringIO()
    Console(file=output, width=200).print(rendered)
    names = [line.split()[0] for line in output.getvalue().splitlines() if line.startswith("s-0")]
    assert names == ["s-003", "s-002", "s-000", "s-001"]
    assert "3 of 5 over" in output.getvalue()

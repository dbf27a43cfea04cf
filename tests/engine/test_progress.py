"""The progress bar without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engine import progress
from engine.progress import ProgressBar


def test_without_a_terminal_a_line_is_printed_at_intervals_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, output = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "console", Console(file=output, width=100))
    with ProgressBar("pretrain", total=10, every_s=5.0) as bar:
        for done in range(1, 11):
            now[0] += 2
            bar.update(done, f"loss {done}")
    lines = output.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/10", "6/10", "9/10", "10/10"]
    assert lines[0] == "pretrain  3/10  6 s  loss 3"

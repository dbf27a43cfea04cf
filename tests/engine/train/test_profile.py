"""The summary page of a profile, from given metric lines and operators."""

from __future__ import annotations

from typing import Any

from engine.train.meter import PHASES
from engine.train.profile import MAX_OPERATORS, Operator, summary_page


def line(step: int, seconds: float) -> dict[str, Any]:
    phases = dict.fromkeys((f"{phase}_s" for phase in PHASES), 0.0) | {
        "forward_s": 0.25 * seconds,
        "backward_s": 0.75 * seconds,
    }
    return {"step": step, "seconds": seconds, "tokens_per_s": 1.0, "mfu": 0.5, "peak_memory_bytes": 2**20, **phases}


def test_the_longest_phase_and_operator_come_first() -> None:
    operators = [Operator("aten::mm", 4, 2.0, 0), Operator("aten::<add>", 2, 0.5, 2**20)]
    page = summary_page("a <title>", [line(3, 1.0)], [line(4, 2.0), line(5, 2.0)], operators)
    assert "The backward takes 75% of a step. Of the operators aten::mm is first, with 50%." in page
    assert "Steps 4 to 5 on rank 0: 2 s each, 1 s without the profiler" in page
    assert "a &lt;title&gt;" in page
    assert "aten::&lt;add&gt;" in page
    assert "<td>0 others" in page


def test_only_the_longest_operators_are_listed() -> None:
    operators = [Operator(f"op{i}", 1, 0.01, 0) for i in range(MAX_OPERATORS + 3)]
    page = summary_page("many", [], [line(1, 2.0)], operators)
    assert f"op{MAX_OPERATORS - 1}<" in page
    assert f"op{MAX_OPERATORS}<" not in page
    assert "<td>3 others" in page
    assert "without the profiler" not in page

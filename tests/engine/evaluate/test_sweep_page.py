"""The page of a sweep: its numbers, plots and sections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.evaluate.sweep_page import describe_saved, draw_curves, draw_parallel, saved_steps, write_sweep_page


def trial(index: int, value: float | None, steps: int, state: str, **params: Any) -> dict[str, Any]:
    return {"index": index, "name": f"s-{index:03d}", "params": params, "budget": 10, "steps": steps, "value": value,
            "others": {}, "state": state, "reason": "step 1: no <number>" if state == "failed" else "", "seconds": 60.0,
            "curve": [(s, 1 / s) for s in range(1, steps + 1)], "process": 1, "losses": 2 if index == 0 else 0}  # fmt: skip


TRIALS = [
    trial(0, 0.5, 10, "finished", **{"optim.lr": 1e-3, "optim.name": "adamw"}),
    trial(1, 0.7, 4, "stopped early", **{"optim.lr": 1e-1, "optim.name": "muon", "optim.momentum": 0.9}),
    trial(2, None, 0, "failed", **{"optim.lr": 10.0, "optim.name": "adamw"}),
    trial(3, 0.6, 10, "finished", **{"optim.lr": 1e-2, "optim.name": "muon", "optim.momentum": 0.8}),
]


def test_saved_time_is_by_the_median_step_time(tmp_path: Path) -> None:
    file = tmp_path / "trials" / "s-001" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    seconds = [20.0, 0.5, 0.5, 0.75]  # the first step includes one-time work
    file.write_text(
        "".join(json.dumps({"step": i + 1, "seconds": s}) + "\n" for i, s in enumerate(seconds)) + '{"step"'
    )
    found = saved_steps(tmp_path, TRIALS)
    assert found == {"taken": 24, "steps": 6, "seconds": pytest.approx(6 * 0.625)}
    assert describe_saved(found, 30.0) == (
        "24 steps ran in 30 s; early stopping saved 6 steps, 20% of all, which at the step times of their trials would have "
        "taken 4 s."
    )


def test_parallel_coordinates_have_an_axis_per_parameter_and_a_line_per_trial() -> None:
    figure = draw_parallel(TRIALS, "loss", "s-000")
    (ax,) = figure.axes
    labels = [label.get_text().replace("\n", "") for label in ax.get_xticklabels()]
    assert labels == ["optim.lr", "optim.momentum", "optim.name", "loss"]
    assert sum(len(line.get_xdata()) == 4 for line in ax.lines) == 3
    momentum = next(line for line in ax.lines if len(line.get_xdata()) == 4 and line.get_linewidth() > 2)
    assert momentum.get_ydata()[1] < 0  # below the axis of a parameter that it does not have
    assert {text.get_text() for text in ax.texts} >= {"0.001", "0.1", "adamw", "muon", "0.5", "0.7"}
    curves = draw_curves(TRIALS, "loss", "s-000").axes[0]
    assert curves.get_ylabel() == "validation loss"
    assert [list(line.get_xdata()) for line in curves.lines if line.get_marker() == "x"] == [[4]]


def test_page_has_every_section(tmp_path: Path) -> None:
    facts = {
        "metric": "loss", "mode": "min", "trials": TRIALS, "best": TRIALS[0], "seconds": 30.0, "metrics": ["loss", "seconds"],
        "front": [], "importances": {"optim.lr": 0.75, "optim.name": 0.25},
        "exploits": [{"step": 2, "member": 1, "donor": 0, "params": {"optim.lr": 2e-3}}],
        "bundle": {"name": "s-soup", "value": 0.4, "step": 10},
    }  # fmt: skip
    page = write_sweep_page(tmp_path, "s", facts).read_text()
    for expected in (
        "s-000 is the best of 4 trials: loss 0.5000", "the bundle is that of s-soup, loss 0.4000", "75%", "Learning curves",
        "finished, restarted 2 times", "failed: step 1: no &lt;number&gt;", "Exploits", "optim.lr=0.002",
        "<th>loss</th>", "Orange: best",
    ):  # fmt: skip
        assert expected in page, expected
    assert "#05" not in page  # replaced by the style's variables

"""The page of one `manta sweep`: its trials, learning curves, parameter importances, and what early stopping saved."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.evaluate.report import ACCENT, INK, MUTED, PAPER, SECOND, axes, code, picture, table, text, write_html

LOG_SCALE_RATIO = 20.0  # an axis whose largest value is more than this many times its smallest is logarithmic
NOT_APPLICABLE = -0.12  # position on the axis of a parameter that the trial does not have
LABEL_BOX = {"facecolor": PAPER, "alpha": 0.8, "linewidth": 0, "pad": 1}  # keeps labels readable over lines
LEGEND = (
    "<p class=mute>Each line is a trial. Orange: best; blue: finished; gray: stopped early or failed. "
    "A line passes below the axis of a parameter that the trial does not have.</p>"
)


def write_sweep_page(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Write sweep.html in `folder` from the content of sweep.json; return its path."""
    trials, best, bundle, metric = result["trials"], result["best"], result["bundle"], result["metric"]
    origin = (
        "its weights are the bundle"
        if bundle["name"] == best["name"]
        else f"the bundle is that of {bundle['name']}, {metric} {bundle['value']:.4f}"
    )
    lead = (
        f"<p class=verdict>{text(best['name'])} is the best of {len(trials)} trials: {text(metric)} "
        f"{best['value']:.4f} with {code(format_params(best['params']))}; {text(origin)}.</p>"
    )
    sections = [
        ("Parallel coordinates", picture(draw_parallel(trials, metric, best["name"])) + LEGEND),
        ("Learning curves", picture(draw_curves(trials, metric, best["name"]))),
        ("Parameter importance", importance(result["importances"])),
        ("Saved by early stopping", f"<p>{text(describe_saved(saved_steps(folder, trials), result['seconds']))}</p>"),
        *([("Pareto front", pareto_front(result))] if result["front"] else []),
        *([("Exploits", exploits(result))] if result["exploits"] else []),
        ("Trials", trials_table(trials, metric, result["mode"])),
    ]
    return write_html(folder / "sweep.html", name, f"{name}: {len(trials)} trials", lead, sections)


def format_params(params: dict[str, Any]) -> str:
    """Return a trial's parameters in one line."""
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def saved_steps(folder: Path, trials: list[dict[str, Any]]) -> dict[str, float]:
    """Return the steps run (taken), the steps saved by early stopping, and the seconds that these would have taken.

    The seconds are by the median step time of each trial.
    """
    stopped = [trial for trial in trials if trial["state"] == "stopped early" and trial["steps"]]
    saved = {trial["name"]: trial["budget"] - trial["steps"] for trial in stopped}
    return {
        "taken": sum(trial["steps"] for trial in trials),
        "steps": sum(saved.values()),
        "seconds": sum(
            steps * median_step_s(folder / "trials" / name / "metrics.jsonl") for name, steps in saved.items()
        ),
    }


def median_step_s(file: Path) -> float:
    """Return the median seconds of the steps in a metrics.jsonl; the first step of a process includes one-time work."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return statistics.median([json.loads(line)["seconds"] for line in lines if line.endswith("}")] or [0.0])


def describe_saved(saved: dict[str, float], seconds: float) -> str:
    """State what early stopping saved."""
    if not saved["steps"]:
        return f"No trial was stopped early: {saved['taken']:,} steps ran in {seconds:.0f} s."
    fraction = saved["steps"] / (saved["steps"] + saved["taken"])
    return (
        f"{saved['taken']:,} steps ran in {seconds:.0f} s; early stopping saved {saved['steps']:,} steps, {fraction:.0%} of all, "
        f"which at the step times of their trials would have taken {saved['seconds']:,.0f} s."
    )


def importance(importances: dict[str, float]) -> str:
    """Draw the importance of each parameter."""
    if not importances:
        return "<p class=mute>Too few trials, or too similar ones, to estimate it.</p>"
    figure, ax = axes(8, 0.5 + 0.32 * len(importances))
    ax.barh(list(importances), list(importances.values()), color=ACCENT, height=0.6)
    for i, value in enumerate(importances.values()):
        ax.text(value, i, f" {value:.0%}", va="center", fontsize=9, color=INK)
    ax.invert_yaxis()
    ax.set_xlabel("share of the variance between trials")
    note = "By fANOVA, or by conditional PED-ANOVA if a parameter applies to some trials only. With few trials the estimate is rough."
    return picture(figure) + f"<p class=mute>{note}</p>"


def pareto_front(result: dict[str, Any]) -> str:
    """List the trials of the Pareto front: no other trial is better in every metric."""
    trials = [trial for trial in result["trials"] if trial["name"] in result["front"]]
    others = result["metrics"][1:]
    rows = [
        (
            text(trial["name"]),
            code(format_params(trial["params"])),
            f"{trial['value']:.4f}",
            *(f"{trial['others'][name]:.4f}" for name in others),
        )
        for trial in trials
    ]
    return table(("trial", "parameters", result["metric"], *others), rows)


def exploits(result: dict[str, Any]) -> str:
    """List which trial continued from the checkpoint of which other one."""
    names = {trial["index"]: trial["name"] for trial in result["trials"]}
    rows = [
        (f"{e['step']:,}", text(names[e["member"]]), text(names[e["donor"]]), code(format_params(e["params"])))
        for e in result["exploits"]
    ]
    return table(("after step", "trial", "continued from", "parameters"), rows)


def trials_table(trials: list[dict[str, Any]], metric: str, mode: str) -> str:
    """List the trials, best first."""
    sign = 1 if mode == "min" else -1
    order = sorted(
        trials, key=lambda t: (t["state"] != "finished", math.inf if t["value"] is None else sign * t["value"])
    )
    rows = [
        (text(t["name"]), code(format_params(t["params"])), f"{t['steps']:,}", "" if t["value"] is None else f"{t['value']:.4f}",
         f"{t['seconds']:.1f} s", text(describe_state(t)))
        for t in order
    ]  # fmt: skip
    return table(("trial", "parameters", "steps", metric, "time", "state"), rows)


def describe_state(trial: dict[str, Any]) -> str:
    """State how a trial ended."""
    restarts = f", restarted {trial['losses']} times" if trial.get("losses") else ""
    return trial["state"] + restarts + (f": {trial['reason']}" if trial["reason"] else "")


def line_style(trial: dict[str, Any], best: str) -> tuple[str, float]:
    """Return a trial's color and line width: the best is emphasized, trials that did not finish are muted."""
    if trial["name"] == best:
        return SECOND, 2.4
    return (ACCENT, 1.2) if trial["state"] == "finished" else (MUTED, 0.8)


def draw_curves(trials: list[dict[str, Any]], metric: str, best: str) -> Figure:
    """Draw each trial's validation metric over its steps; a trial that did not finish ends in a cross."""
    figure, ax = axes(8, 3.2)
    for trial in sorted(trials, key=lambda t: t["name"] == best):
        if trial["curve"]:
            steps, values = zip(*trial["curve"], strict=True)
            color, width = line_style(trial, best)
            ax.plot(steps, values, "-", color=color, lw=width)
            ax.plot(steps[-1], values[-1], "o" if trial["state"] == "finished" else "x", color=color, ms=5)
    ax.set(xlabel="step (x: stopped early or failed)", ylabel=f"validation {metric}")
    return figure


def draw_parallel(trials: list[dict[str, Any]], metric: str, best: str) -> Figure:
    """Draw parallel coordinates: a line for each trial with a value, an axis for each parameter and one for the metric."""
    measured = [trial for trial in trials if trial["value"] is not None]
    keys = sorted({key for trial in measured for key in trial["params"]})
    scales = [Scale([trial["params"][key] for trial in measured if key in trial["params"]]) for key in keys]
    scales.append(Scale([trial["value"] for trial in measured]))
    figure, ax = axes(max(8.0, 1.6 * len(scales)), 3.6)
    for x, scale in enumerate(scales):
        ax.axvline(x, color=MUTED, lw=0.8)
        for label, y in scale.labels():
            ax.text(x + 0.03, y, label, fontsize=8, color=INK, va="center", bbox=LABEL_BOX, zorder=3)
    for trial in sorted(measured, key=lambda t: t["name"] == best):
        color, width = line_style(trial, best)
        params = trial["params"]
        heights = [s.position(params[k]) if k in params else NOT_APPLICABLE for k, s in zip(keys, scales)]
        ax.plot(range(len(scales)), [*heights, scales[-1].position(trial["value"])], color=color, lw=width)
    ax.set_xticks(range(len(scales)), [*(key.replace(".", ".\n") for key in keys), metric])
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlim(-0.1, len(scales) - 0.6)
    return figure


class Scale:
    """Maps the values of a parameter in the trials to positions from 0 to 1 on an axis."""

    def __init__(self, values: list[Any]) -> None:
        """Scale by the values: numbers linearly or logarithmically, others in sorted order."""
        self._is_numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        self._values: list[Any] = sorted(set(values)) if self._is_numeric else sorted({str(value) for value in values})
        self._is_log = (
            self._is_numeric and bool(values) and min(values) > 0 and max(values) > LOG_SCALE_RATIO * min(values)
        )

    def position(self, value: Any) -> float:
        """Return the position of a value."""
        if not self._is_numeric:
            return self._values.index(str(value)) / max(1, len(self._values) - 1)
        low, high, x = (math.log(v) if self._is_log else v for v in (self._values[0], self._values[-1], value))
        return 0.5 if high == low else (x - low) / (high - low)

    def labels(self) -> list[tuple[str, float]]:
        """Return the labels of the axis with their positions: each of up to five values, else the smallest and the largest."""
        shown = self._values if len(self._values) <= 5 else [self._values[0], self._values[-1]]
        return [(f"{v:.3g}" if isinstance(v, float) else str(v), self.position(v)) for v in shown]

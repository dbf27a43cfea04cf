"""The page of one `manta sweep`: what was tried, how it went, which values mattered, what stopping early has saved."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.evaluate.report import ACCENT, INK, MUTED, PAPER, SECOND, axes, code, picture, table, text, write_html

LOGARITHMIC = 20.0  # an axis whose greatest value is so many times its least shows logarithms
BESIDE = -0.12  # where a line passes an axis whose key does not apply to the trial
BEHIND = {"facecolor": PAPER, "alpha": 0.8, "linewidth": 0, "pad": 1}  # what is written stays readable over lines
LEGEND = (
    "<p class=mute>Each line is a trial. Orange: the best; blue: came to its end; grey: was stopped early or failed. "
    "A line passes below an axis whose key did not apply to the trial.</p>"
)


def write_sweep_page(folder: Path, name: str, facts: dict[str, Any]) -> Path:
    """Write sweep.html in `folder` from the facts of sweep.json; return its path."""
    trials = facts["trials"]
    bundle = facts["bundle"]
    kept = (
        f"the bundle is that of {bundle['name']}, {facts['metric']} {bundle['value']:.4f}"
        if bundle["name"] != facts["best"]["name"]
        else "its weights are the bundle"
    )
    lead = (
        f"<p class=verdict>{text(facts['best']['name'])} is best of {len(trials)} trials: {text(facts['metric'])} "
        f"{facts['best']['value']:.4f} with {code(values(facts['best']['params']))}; {text(kept)}.</p>"
    )
    sections = [
        ("Every trial, axis by axis", picture(draw_parallel(trials, facts["metric"], facts["best"]["name"])) + LEGEND),
        ("Learning curves", picture(draw_curves(trials, facts["metric"], facts["best"]["name"]))),
        ("Which values mattered", importance(facts["importances"])),
        ("What stopping early has saved", f"<p>{text(describe_saved(saved_steps(folder, trials), facts['seconds']))}</p>"),
        *([("Not beaten in all metrics", front(facts))] if facts["front"] else []),
        *([("Who went on from whom", exploits(facts))] if facts["exploits"] else []),
        ("The trials", listed(trials, facts["metric"], facts["mode"])),
    ]
    return write_html(folder / "sweep.html", name, f"{name}: {len(trials)} trials", lead, sections)


def values(params: dict[str, Any]) -> str:
    """Write a trial's values in one line."""
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def saved_steps(folder: Path, trials: list[dict[str, Any]]) -> dict[str, float]:
    """Return the steps taken and not taken, and the seconds that the latter would have cost at each trial's own pace."""
    stopped = [trial for trial in trials if trial["state"] == "stopped early" and trial["steps"]]
    left = {trial["name"]: trial["budget"] - trial["steps"] for trial in stopped}
    return {
        "taken": sum(trial["steps"] for trial in trials),
        "steps": sum(left.values()),
        "seconds": sum(steps * pace(folder / "trials" / name / "metrics.jsonl") for name, steps in left.items()),
    }


def pace(file: Path) -> float:
    """Return the median seconds of the steps in a metrics.jsonl: what a process does once, in its first step, is no pace."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return statistics.median([json.loads(line)["seconds"] for line in lines if line.endswith("}")] or [0.0])


def describe_saved(found: dict[str, float], seconds: float) -> str:
    """Say what was saved."""
    if not found["steps"]:
        return f"No trial was stopped early: {found['taken']:,} steps were taken, in {seconds:.0f} s."
    share = found["steps"] / (found["steps"] + found["taken"])
    return (
        f"{found['taken']:,} steps were taken, in {seconds:.0f} s, and {found['steps']:,} were not: {share:.0%} of all. "
        f"At their trials' own pace these would have taken {found['seconds']:,.0f} s of a trial's time."
    )


def importance(found: dict[str, float]) -> str:
    """Draw each key's share."""
    if not found:
        return "<p class=mute>Too few trials, or too equal ones, to tell.</p>"
    figure, ax = axes(8, 0.5 + 0.32 * len(found))
    ax.barh(list(found), list(found.values()), color=ACCENT, height=0.6)
    for i, value in enumerate(found.values()):
        ax.text(value, i, f" {value:.0%}", va="center", fontsize=9, color=INK)
    ax.invert_yaxis()
    ax.set_xlabel("share of the differences between trials")
    note = (
        "By fANOVA, or conditional PED-ANOVA where a key applies to some trials only. With few trials these are rough."
    )
    return picture(figure) + f"<p class=mute>{note}</p>"


def front(facts: dict[str, Any]) -> str:
    """List the trials that no other is better than in every metric."""
    found = [trial for trial in facts["trials"] if trial["name"] in facts["front"]]
    others = facts["metrics"][1:]
    rows = [
        (text(t["name"]), code(values(t["params"])), f"{t['value']:.4f}", *(f"{t['others'][n]:.4f}" for n in others))
        for t in found
    ]
    return table(("trial", "what differs", facts["metric"], *others), rows)


def exploits(facts: dict[str, Any]) -> str:
    """List who copied whom."""
    names = {trial["index"]: trial["name"] for trial in facts["trials"]}
    rows = [
        (f"{e['step']:,}", text(names[e["member"]]), text(names[e["donor"]]), code(values(e["params"])))
        for e in facts["exploits"]
    ]
    return table(("after step", "who", "went on from", "with"), rows)


def listed(trials: list[dict[str, Any]], metric: str, mode: str) -> str:
    """List the trials, the best first."""
    sign = 1 if mode == "min" else -1
    order = sorted(
        trials, key=lambda t: (t["state"] != "finished", math.inf if t["value"] is None else sign * t["value"])
    )
    rows = [
        (text(t["name"]), code(values(t["params"])), f"{t['steps']:,}", "" if t["value"] is None else f"{t['value']:.4f}",
         f"{t['seconds']:.1f} s", text(ending(t)))
        for t in order
    ]  # fmt: skip
    return table(("trial", "what differs", "steps", metric, "took", ""), rows)


def ending(trial: dict[str, Any]) -> str:
    """Say how a trial ended."""
    again = f", begun again {trial['losses']} times" if trial.get("losses") else ""
    return trial["state"] + again + (f": {trial['reason']}" if trial["reason"] else "")


def colour(trial: dict[str, Any], best: str) -> tuple[str, float]:
    """Return a trial's colour and width: the best stands out, those that were stopped stand back."""
    if trial["name"] == best:
        return SECOND, 2.4
    return (ACCENT, 1.2) if trial["state"] == "finished" else (MUTED, 0.8)


def draw_curves(trials: list[dict[str, Any]], metric: str, best: str) -> Figure:
    """Draw each trial's validations; one that was stopped early ends in a cross."""
    figure, ax = axes(8, 3.2)
    for trial in sorted(trials, key=lambda t: t["name"] == best):
        if trial["curve"]:
            steps, found = zip(*trial["curve"], strict=True)
            shade, width = colour(trial, best)
            ax.plot(steps, found, "-", color=shade, lw=width)
            ax.plot(steps[-1], found[-1], "o" if trial["state"] == "finished" else "x", color=shade, ms=5)
    ax.set(xlabel="step (x: stopped early or failed)", ylabel=f"validation {metric}")
    return figure


def draw_parallel(trials: list[dict[str, Any]], metric: str, best: str) -> Figure:
    """Draw each trial with a figure as a line over one axis for each key, and the metric's at the right."""
    told = [trial for trial in trials if trial["value"] is not None]
    keys = sorted({key for trial in told for key in trial["params"]})
    scales = [Scale([t["params"][key] for t in told if key in t["params"]]) for key in keys]
    scales.append(Scale([trial["value"] for trial in told]))
    figure, ax = axes(max(8.0, 1.6 * len(scales)), 3.6)
    for at, scale in enumerate(scales):
        ax.axvline(at, color=MUTED, lw=0.8)
        for value, place in scale.marks():
            ax.text(at + 0.03, place, value, fontsize=8, color=INK, va="center", bbox=BEHIND, zorder=3)
    for trial in sorted(told, key=lambda t: t["name"] == best):
        shade, width = colour(trial, best)
        places = [s.place(trial["params"][k]) if k in trial["params"] else BESIDE for k, s in zip(keys, scales)]
        ax.plot(range(len(scales)), [*places, scales[-1].place(trial["value"])], color=shade, lw=width)
    ax.set_xticks(range(len(scales)), [*(key.replace(".", ".\n") for key in keys), metric])
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlim(-0.1, len(scales) - 0.6)
    return figure


class Scale:
    """Places the values that a key had in the trials on an axis from 0 to 1."""

    def __init__(self, seen: list[Any]) -> None:
        """Scale by the values: numbers by their size or its logarithm, others in their order."""
        self._numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in seen)
        self._values: list[Any] = sorted(set(seen)) if self._numbers else sorted({str(value) for value in seen})
        self._log = self._numbers and bool(seen) and min(seen) > 0 and max(seen) > LOGARITHMIC * min(seen)

    def place(self, value: Any) -> float:
        """Return where a value is."""
        if not self._numbers:
            return self._values.index(str(value)) / max(1, len(self._values) - 1)
        low, high, at = (math.log(v) if self._log else v for v in (self._values[0], self._values[-1], value))
        return 0.5 if high == low else (at - low) / (high - low)

    def marks(self) -> list[tuple[str, float]]:
        """Return what is written beside the axis, and where: each of a few values, else the least and the greatest."""
        few = self._values if len(self._values) <= 5 else [self._values[0], self._values[-1]]
        return [(f"{v:.3g}" if isinstance(v, float) else str(v), self.place(v)) for v in few]

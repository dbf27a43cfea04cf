"""Self-contained HTML pages without scripts or external resources, and the page of `manta demo`."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from engine.evaluate.bootstrap import BETTER, INCONCLUSIVE, WORSE

# Matplotlib draws in these colors; in the page CSS variables replace them, so that pictures follow light and dark mode.
INK, MUTED, ACCENT, SECOND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--mute)", ACCENT: "var(--blue)", SECOND: "var(--orange)", PAPER: "var(--paper)",
}  # fmt: skip
SVG_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "manta",
}  # text stays text, and the same input gives the same page

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --paper: #ffffff; --soft: #f3f5f9; --line: #dde2ea; --mute: #667085; --blue: #2f6fde; --orange: #c9621a }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14181f; --soft: #1d232d; --line: #333c4a; --mute: #98a2b3; --blue: #6ea0ff; --orange: #f0a060 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
.verdict { background: var(--soft); padding: .9rem 1.1rem; border-left: .25rem solid var(--blue); border-radius: .3rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top } th { color: var(--mute); font-weight: 500 }
code, pre { font: .82rem/1.45 ui-monospace, monospace } pre { background: var(--soft); padding: .7rem; border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 }
td code { overflow-wrap: anywhere } svg { width: 100%; height: auto } .mute { color: var(--mute) }
.wide { overflow-x: auto }
"""


def write_report(folder: Path, summary: dict[str, Any]) -> Path:
    """Write report.html in `folder` from the content of summary.json and `curves`; return its path."""
    sections = [
        ("Time by stage", picture(draw_times(summary["seconds"]))),
        ("Pre-training", pretraining(summary)),
        ("Sweep", sweep(summary["trials"])),
        ("Accuracy on held-out files", accuracies(summary["accuracy"])),
        *classification(summary.get("details") or {}),
        ("Endpoint", endpoint(summary["endpoint"])),
        (
            "Artisummary",
            table(("artifact", "SHA-256"), [(name, code(value)) for name, value in summary["hashes"].items()]),
        ),
        (
            "Machine and versions",
            table(("", ""), [(k, text(v)) for k, v in {**summary["machine"], **summary["versions"]}.items()]),
        ),
    ]
    title = summary.get("name", folder.name)
    lead = (
        f"<p class=mute>{minutes(summary['seconds'])} in all, on {text(summary['machine'].get('processor', 'this machine'))}</p>"
        f"<p class=verdict>{text(pretraining_conclusion(summary))}</p>"
    )
    return write_html(folder / "report.html", title, f"{title}: from raw text to an endpoint", lead, sections)


def write_html(file: Path, title: str, heading: str, lead: str, sections: Sequence[tuple[str, str]]) -> Path:
    """Write a page of (title, HTML) sections with the style embedded; return its path."""
    body = "".join(f"<h2>{text(name)}</h2>{content}" for name, content in sections)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{text(title)}</title><style>{STYLE}</style><h1>{text(heading)}</h1>{lead}{body}</html>",
        encoding="utf-8",
    )
    return file


def minutes(seconds: dict[str, float]) -> str:
    """Return the total time in words."""
    total = seconds.get("total") or sum(seconds.values())
    return f"{total / 60:.1f} minutes" if total >= 120 else f"{total:.0f} seconds"


def pretraining_conclusion(summary: dict[str, Any]) -> str:
    """State whether pre-training improved the accuracy."""
    finetuned, scratch, gain = (
        summary["accuracy"]["finetuned"],
        summary["accuracy"]["scratch"],
        summary["pretraining_paid"],
    )
    conclusion = {
        BETTER: "Pre-training improved the accuracy",
        WORSE: "Pre-training reduced the accuracy",
        INCONCLUSIVE: "Pre-training made no significant difference on this many examples",
    }[gain["verdict"]]
    return (
        f"{conclusion}: on files that no training stage saw it is {finetuned['value']:.1%} when fine-tuned from the pre-trained "
        f"model, and {scratch['value']:.1%} when trained from scratch; the difference is {100 * gain['difference']:+.1f} points "
        f"(95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}, paired bootstrap on the same examples)."
    )


def pretraining(summary: dict[str, Any]) -> str:
    """Draw the loss curve and state the perplexity."""
    perplexity = summary["perplexity"]
    return (
        picture(draw_curve(summary["curves"]["pretrain"]))
        + f"<p>Perplexity on held-out files: {perplexity['value']:.1f} ({perplexity['low']:.1f} to {perplexity['high']:.1f}).</p>"
    )


def sweep(trials: list[dict[str, Any]]) -> str:
    """Draw the trials' curves and list them, best first."""
    rows = [
        (text(t["name"]), code(", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in t["config"].items())),
         str(t["steps"]), "" if t["accuracy"] is None else f"{t['accuracy']:.3f}", text(trial_state(t)))
        for t in sorted(trials, key=lambda t: (trial_state(t) != "finished", -(t["accuracy"] or 0)))
    ]  # fmt: skip
    return picture(draw_trials(trials)) + table(
        ("trial", "parameters", "steps", "accuracy (validation)", "state"), rows
    )


def trial_state(trial: dict[str, Any]) -> str:
    """Return how a trial ended."""
    return trial.get("state") or ("stopped early" if trial["stopped_early"] else "finished")


def accuracies(accuracy: dict[str, Any]) -> str:
    """Draw each accuracy with its interval, and list them."""
    known = {name: value for name, value in accuracy.items() if value}
    rows = [(text(n), f"{v['value']:.3f}", f"{v['low']:.3f} to {v['high']:.3f}") for n, v in known.items()]
    return picture(draw_intervals(known)) + table(("", "accuracy", "95 % interval"), rows)


def classification(details: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the sections of a classifier: reliability diagram, confusion matrix, metrics of each class."""
    if not details:
        return []
    rows = [
        (text(c["label"]), f"{c['precision']:.3f}", f"{c['recall']:.3f}", f"{c['f1']:.3f}", f"{c['examples']:,}")
        for c in details["classes"]
    ]
    sections = [
        ("Confusion matrix", picture(draw_confusion(details["labels"], details["confusion"]))),
        ("Classes", table(("class", "precision", "recall", "F1", "examples"), rows)),
    ]
    if details.get("reliability"):
        about = "<p class=mute>On the line, a prediction with a probability of 0.8 is correct in 8 of 10 cases.</p>"
        sections.insert(0, ("Reliability diagram", picture(draw_reliability(details["reliability"])) + about))
    return sections


def endpoint(result: dict[str, Any]) -> str:
    """List the requests and responses."""
    rows = [
        (
            text(r["what"]),
            f"<pre>{text(r['request'])}</pre>",
            f"<pre>{text(r['answer'])}</pre>",
            f"{r['milliseconds']:.0f} ms",
        )
        for r in result["requests"]
    ]
    commands = "".join(f"<pre>{text(r['curl'])}</pre>" for r in result["requests"] if "curl" in r)
    repeat = (
        f"<p class=mute>To repeat, while the endpoint runs at {code(result['url'])}:</p>{commands}" if commands else ""
    )
    return table(("", "request", "response", "time"), rows) + repeat


def axes(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure (size in inches) with minimal axes that suit light and dark pages."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.add_subplot()
    ax.patch.set_alpha(0)
    ax.tick_params(colors=INK, labelsize=9)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    return figure, ax


def draw_times(seconds: dict[str, float]) -> Figure:
    """Draw a bar for each stage."""
    stages = [(name, value) for name, value in seconds.items() if name != "total"]
    figure, ax = axes(8, 0.4 + 0.32 * len(stages))
    ax.barh([name for name, _ in stages], [value for _, value in stages], color=ACCENT, height=0.6)
    for i, (_, value) in enumerate(stages):
        ax.text(value, i, f" {value:.0f} s", va="center", fontsize=9, color=INK)
    ax.invert_yaxis()
    return figure


def draw_curve(lines: list[dict[str, Any]]) -> Figure:
    """Draw the training loss of each step and the validation losses."""
    figure, ax = axes(8, 2.8)
    losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]  # skipped steps leave a gap
    ax.plot([line["step"] for line in lines], losses, color=ACCENT, lw=1.2, label="training")
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if validation:
        ax.plot(*zip(*validation, strict=True), "o-", color=SECOND, ms=4, lw=1.2, label="validation")
    ax.set(xlabel="step", ylabel="loss, nats per token")
    ax.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def draw_trials(trials: list[dict[str, Any]]) -> Figure:
    """Draw each trial's validation accuracy over its steps; trials stopped early end in a cross."""
    figure, ax = axes(8, 2.8)
    for trial in trials:
        if not trial["curve"]:
            continue
        steps, values = zip(*trial["curve"], strict=True)
        stopped = trial_state(trial) != "finished"
        ax.plot(steps, values, "-", color=MUTED if stopped else ACCENT, lw=1.2)
        ax.plot(steps[-1], values[-1], "x" if stopped else "o", color=SECOND if stopped else ACCENT, ms=5)
    ax.set(xlabel="step (x: stopped early)", ylabel="validation accuracy")
    return figure


def draw_intervals(values: dict[str, dict[str, float]]) -> Figure:
    """Draw a dot with its interval for each value."""
    figure, ax = axes(8, 0.5 + 0.35 * len(values))
    for i, value in enumerate(values.values()):
        ax.plot([value["low"], value["high"]], [i, i], color=ACCENT, lw=2.2, solid_capstyle="round")
        ax.plot(value["value"], i, "o", color=ACCENT, ms=7)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.set_xlabel("accuracy")
    return figure


def draw_reliability(bins: list[dict[str, Any]]) -> Figure:
    """Draw the accuracy of each confidence bin, and the share of the examples in it."""
    figure, ax = axes(8, 3.2)
    total = sum(b["examples"] for b in bins)
    ax.plot([0, 1], [0, 1], "--", color=MUTED, lw=1)
    ax.bar([b["confidence"] for b in bins], [b["examples"] / total for b in bins], width=0.03, color=MUTED, alpha=0.5,
           label="share of the examples")  # fmt: skip
    ax.plot(
        [b["confidence"] for b in bins],
        [b["accuracy"] for b in bins],
        "o-",
        color=ACCENT,
        lw=1.4,
        ms=5,
        label="accuracy",
    )
    ax.set(xlabel="probability of the predicted class", ylabel="share", xlim=(0, 1.02), ylim=(0, 1.02))
    ax.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def draw_confusion(labels: list[str], counts: list[list[int]]) -> Figure:
    """Draw the share of each label's examples (a row) by predicted class, with the counts where there is room for them."""
    size = len(labels)
    figure, ax = axes(8, 1.2 + 0.28 * size)
    for row, line in enumerate(counts):
        for column, value in enumerate(line):
            share = value / max(sum(line), 1)
            color = ACCENT if row == column else SECOND
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=color, alpha=0.7 * share, lw=0))
            if value and size <= 24:
                ax.text(column, row, str(value), ha="center", va="center", fontsize=8, color=INK)
    ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="predicted", ylabel="label")
    ax.set_xticks(range(size), labels, rotation=90)
    ax.set_yticks(range(size), labels)
    return figure


def picture(figure: Figure) -> str:
    """Return a figure as inline SVG without external references."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SVG_PARAMS):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML implies the namespaces
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the ids repeat from figure to figure
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return an HTML table; the cells are HTML already."""
    line = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{line}</tr>{body}</table></div>"


def code(value: object) -> str:
    """Return text in a monospaced font."""
    return f"<code>{text(value)}</code>"


def text(value: object) -> str:
    """Return a value as escaped text; anything but a string as JSON."""
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

"""One self-contained page about the life of a model: no script, no font and no picture from elsewhere."""

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

# Matplotlib draws in these; in the page they become the style's variables, so that pictures follow light and dark too.
INK, MUTED, ACCENT, SECOND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--mute)", ACCENT: "var(--blue)", SECOND: "var(--orange)", PAPER: "var(--paper)",
}  # fmt: skip
DRAWN: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "manta",
}  # text stays text, and the same facts give the same page

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


def write_report(folder: Path, facts: dict[str, Any]) -> Path:
    """Write report.html in `folder` from the facts of summary.json and `curves`; return its path."""
    sections = [
        ("Where the time went", picture(draw_times(facts["seconds"]))),
        ("Pre-training", pretraining(facts)),
        ("The sweep", sweep(facts["trials"])),
        ("On held-out files", accuracies(facts["accuracy"])),
        *classification(facts.get("details") or {}),
        ("The endpoint", endpoint(facts["endpoint"])),
        ("Artifacts", table(("artifact", "SHA-256"), [(name, code(value)) for name, value in facts["hashes"].items()])),
        (
            "Machine and versions",
            table(("", ""), [(k, text(v)) for k, v in {**facts["machine"], **facts["versions"]}.items()]),
        ),
    ]
    title = facts.get("name", folder.name)
    lead = (
        f"<p class=mute>{minutes(facts['seconds'])} in all, on {text(facts['machine'].get('processor', 'this machine'))}</p>"
        f"<p class=verdict>{text(pretraining_conclusion(facts))}</p>"
    )
    return write_html(folder / "report.html", title, f"{title}: from raw text to an endpoint", lead, sections)


def write_html(file: Path, title: str, heading: str, lead: str, sections: Sequence[tuple[str, str]]) -> Path:
    """Write a page of (title, HTML) sections with the house's style in it; return its path."""
    body = "".join(f"<h2>{text(name)}</h2>{content}" for name, content in sections)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{text(title)}</title><style>{STYLE}</style><h1>{text(heading)}</h1>{lead}{body}</html>",
        encoding="utf-8",
    )
    return file


def minutes(seconds: dict[str, float]) -> str:
    """Return the whole time, in words."""
    whole = seconds.get("total") or sum(seconds.values())
    return f"{whole / 60:.1f} minutes" if whole >= 120 else f"{whole:.0f} seconds"


def pretraining_conclusion(facts: dict[str, Any]) -> str:
    """Say plainly whether pre-training paid."""
    tuned, scratch, paid = facts["accuracy"]["finetuned"], facts["accuracy"]["scratch"], facts["pretraining_paid"]
    says = {
        "better": "Pre-training paid",
        "worse": "Pre-training did harm",
        "not told apart": "Whether pre-training paid cannot be told from this many examples",
    }[paid["verdict"]]
    return (
        f"{says}: fine-tuned from the pre-trained model the accuracy on files that no training stage saw is {tuned['value']:.1%}, "
        f"by the same training from scratch {scratch['value']:.1%}; the difference is {100 * paid['difference']:+.1f} points "
        f"(95 % interval {100 * paid['low']:+.1f} to {100 * paid['high']:+.1f}, the same examples for both)."
    )


def pretraining(facts: dict[str, Any]) -> str:
    """Draw the loss curve and give the perplexity."""
    perplexity = facts["perplexity"]
    return (
        picture(draw_curve(facts["curves"]["pretrain"]))
        + f"<p>Perplexity on held-out files: {perplexity['value']:.1f} ({perplexity['low']:.1f} to {perplexity['high']:.1f}).</p>"
    )


def sweep(trials: list[dict[str, Any]]) -> str:
    """Draw the trials' curves and list them, the best first."""
    rows = [
        (text(t["name"]), code(", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in t["config"].items())),
         str(t["steps"]), "" if t["accuracy"] is None else f"{t['accuracy']:.3f}", text(ending(t)))
        for t in sorted(trials, key=lambda t: (ending(t) != "finished", -(t["accuracy"] or 0)))
    ]  # fmt: skip
    return picture(draw_trials(trials)) + table(("trial", "what differs", "steps", "accuracy (validation)", ""), rows)


def ending(trial: dict[str, Any]) -> str:
    """Say how a trial ended."""
    return trial.get("state") or ("stopped early" if trial["stopped_early"] else "finished")


def accuracies(accuracy: dict[str, Any]) -> str:
    """Draw each accuracy with its interval, and list them."""
    found = {name: value for name, value in accuracy.items() if value}
    rows = [(text(n), f"{v['value']:.3f}", f"{v['low']:.3f} to {v['high']:.3f}") for n, v in found.items()]
    return picture(draw_intervals(found)) + table(("", "accuracy", "95 % interval"), rows)


def classification(details: dict[str, Any]) -> list[tuple[str, str]]:
    """Draw how sure a classifier is against how often it is right, and which classes it takes for which."""
    if not details:
        return []
    rows = [
        (text(c["label"]), f"{c['precision']:.3f}", f"{c['recall']:.3f}", f"{c['f1']:.3f}", f"{c['examples']:,}")
        for c in details["classes"]
    ]
    found = [
        ("Which class is taken for which", picture(draw_confusion(details["labels"], details["confusion"]))),
        ("The classes", table(("class", "precision", "recall", "F1", "examples"), rows)),
    ]
    if details.get("reliability"):
        about = "<p class=mute>On the line, an answer given with a probability of 0.8 is right in 8 of 10 cases.</p>"
        found.insert(
            0, ("How sure it is, and how often right", picture(draw_reliability(details["reliability"])) + about)
        )
    return found


def endpoint(facts: dict[str, Any]) -> str:
    """List what was asked and answered."""
    rows = [
        (
            text(r["what"]),
            f"<pre>{text(r['request'])}</pre>",
            f"<pre>{text(r['answer'])}</pre>",
            f"{r['milliseconds']:.0f} ms",
        )
        for r in facts["requests"]
    ]
    asked = "".join(f"<pre>{text(r['curl'])}</pre>" for r in facts["requests"] if "curl" in r)
    again = f"<p class=mute>To ask again, while the endpoint is up at {code(facts['url'])}:</p>{asked}" if asked else ""
    return table(("", "asked", "answered", "took"), rows) + again


def axes(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure, in inches, with quiet axes that suit a light and a dark page."""
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
    """Draw a bar a stage."""
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
    losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]  # a gap where a step was skipped
    ax.plot([line["step"] for line in lines], losses, color=ACCENT, lw=1.2, label="training")
    held = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if held:
        ax.plot(*zip(*held, strict=True), "o-", color=SECOND, ms=4, lw=1.2, label="validation")
    ax.set(xlabel="step", ylabel="loss, nats a token")
    ax.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def draw_trials(trials: list[dict[str, Any]]) -> Figure:
    """Draw each trial's validation accuracy over its steps; those stopped early end in a cross."""
    figure, ax = axes(8, 2.8)
    for trial in trials:
        if not trial["curve"]:
            continue
        steps, values = zip(*trial["curve"], strict=True)
        stopped = ending(trial) != "finished"
        ax.plot(steps, values, "-", color=MUTED if stopped else ACCENT, lw=1.2)
        ax.plot(steps[-1], values[-1], "x" if stopped else "o", color=SECOND if stopped else ACCENT, ms=5)
    ax.set(xlabel="step (x: stopped early)", ylabel="validation accuracy")
    return figure


def draw_intervals(found: dict[str, dict[str, float]]) -> Figure:
    """Draw a dot and its interval for each."""
    figure, ax = axes(8, 0.5 + 0.35 * len(found))
    for i, value in enumerate(found.values()):
        ax.plot([value["low"], value["high"]], [i, i], color=ACCENT, lw=2.2, solid_capstyle="round")
        ax.plot(value["value"], i, "o", color=ACCENT, ms=7)
    ax.set_yticks(range(len(found)), list(found))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.set_xlabel("accuracy")
    return figure


def draw_reliability(bins: list[dict[str, Any]]) -> Figure:
    """Draw the accuracy of each bin of confidence, and the share of examples in it."""
    figure, ax = axes(8, 3.2)
    total = sum(one["examples"] for one in bins)
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
    ax.set(xlabel="probability of the class named", ylabel="share", xlim=(0, 1.02), ylim=(0, 1.02))
    ax.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def draw_confusion(labels: list[str], counts: list[list[int]]) -> Figure:
    """Draw the share of each label's examples (a row) that each class was named for, with the counts where they can be read."""
    size = len(labels)
    figure, ax = axes(8, 1.2 + 0.28 * size)
    for row, line in enumerate(counts):
        for column, value in enumerate(line):
            share = value / max(sum(line), 1)
            colour = ACCENT if row == column else SECOND
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.7 * share, lw=0))
            if value and size <= 24:
                ax.text(column, row, str(value), ha="center", va="center", fontsize=8, color=INK)
    ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="named", ylabel="label")
    ax.set_xticks(range(size), labels, rotation=90)
    ax.set_yticks(range(size), labels)
    return figure


def picture(figure: Figure) -> str:
    """Return a figure as inline SVG, with nothing in it that points elsewhere."""
    buffer = io.StringIO()
    with matplotlib.rc_context(DRAWN):
        figure.savefig(buffer, format="svg", transparent=True)
    drawn = buffer.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn)  # HTML knows the namespaces
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)  # the names repeat from picture to picture
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", drawn)
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    return drawn


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return an HTML table; the cells are HTML already."""
    line = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{line}</tr>{body}</table></div>"


def code(value: object) -> str:
    """Return text in a fixed-width face."""
    return f"<code>{text(value)}</code>"


def text(value: object) -> str:
    """Return a value as escaped text; structures as JSON."""
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

"""The page of one `manta evaluate`: every figure with its interval, calibration, confusion, slices, pairs, written text, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.evaluate.images import describe_images
from engine.evaluate.report import ACCENT, MUTED, axes, classification, code, picture, table, text, write_html

Metrics = dict[str, dict[str, float]]


def write_evaluation_page(folder: Path, facts: dict[str, Any]) -> Path:
    """Write evaluation.html in `folder` from the facts of evaluation.json; return its path."""
    sections = []
    many = len(facts["bundles"]) > 1
    for told in facts["bundles"]:
        start = f"{told['bundle']}: " if many else ""
        found = [
            ("Figures", figures(told)),
            *classification(told["details"]),
            *([(f"By {told['slice_column']}", slices(told))] if told["slices"] else []),
            *(
                [("Pairs that differ only in whom they are about", pairs(told["pairs"], told["confidence"]))]
                if told["pairs"]
                else []
            ),
            *([("Written text", generation(told["generation"], told["confidence"]))] if told["generation"] else []),
            *([("Images", images(told["images"], told["confidence"]))] if told["images"] else []),
            (
                "What was measured",
                table(("", ""), [(key, code(told[key])) for key in ("hash", "data", "data_hash", "time")]),
            ),
        ]
        sections += [(start + title, content) for title, content in found]
    lead = ""
    if found := facts["comparison"]:
        lead = (
            f"<p class=verdict>{text(facts['bundles'][0]['bundle'])} is {text(found['verdict'])} against "
            f"{text(facts['bundles'][1]['bundle'])}: {text(found['metric'])} differs by {found['difference']:+.4f} "
            f"({found['low']:+.4f} to {found['high']:+.4f}, the same examples for both).</p>"
        )
    names = " and ".join(told["bundle"] for told in facts["bundles"])
    return write_html(folder / "evaluation.html", names, f"{names} on the {facts['split']} split", lead, sections)


def figures(told: dict[str, Any]) -> str:
    """List the metrics."""
    rows = dict(told["metrics"])
    if told["majority"]:
        rows["accuracy of the majority class"] = told["majority"]
    return f"<p>{told['examples']:,} examples.</p>" + metrics_table(rows, told["confidence"])


def slices(told: dict[str, Any]) -> str:
    """Draw each group's gap to the others in the first metric, and list all of them."""
    headline = next(iter(told["metrics"]))
    gaps = {one["group"]: one["gaps"][headline] for one in told["slices"]}
    parts = [picture(draw_gaps(gaps, headline))]
    interval = f"{100 * told['confidence']:g} % interval"
    for one in told["slices"]:
        rows = [(text(n), *cells(value), *cells(one["gaps"][n])) for n, value in one["metrics"].items()]
        head = ("metric", "value", interval, "minus the others", interval)
        parts.append(f"<p>{text(one['group'])}, {one['examples']:,} examples</p>" + table(head, rows))
    return "".join(parts)


def pairs(told: dict[str, Any], confidence: float) -> str:
    """List the figures over the pairs and those pairs that are taken most differently."""
    shown = [
        (
            text(one["a"]),
            text(one["b"]),
            text(", ".join(f"{k} {v:+.3f}" for k, v in one.items() if k not in ("a", "b"))),
        )
        for one in told["extremes"]
    ]
    about = f"<p>{told['pairs']:,} pairs of {code(told['file'])}.</p>"
    return about + metrics_table(told["metrics"], confidence) + table(("a", "b", "most different"), shown)


def generation(told: dict[str, Any], confidence: float) -> str:
    """List the figures of the written text and some examples."""
    shown = [(text(one["source"]), text(one["target"]), text(one["written"])) for one in told["shown"]]
    about = f"<p>{told['examples']:,} examples of {code(told['file'])}.</p>"
    return about + metrics_table(told["metrics"], confidence) + table(("from", "reference", "written"), shown)


def images(told: dict[str, Any], confidence: float) -> str:
    """List the distances, and say what they are of."""
    note = "Not to be compared with a published FID, which is of Inception's features."
    return f"<p>{text(describe_images(told))}. {note}</p>" + metrics_table(told["metrics"], confidence)


def metrics_table(metrics: Metrics, confidence: float) -> str:
    """List metrics with their intervals."""
    rows = [(text(n), *cells(value)) for n, value in metrics.items()]
    return table(("metric", "value", f"{100 * confidence:g} % interval"), rows)


def cells(value: dict[str, float]) -> tuple[str, str]:
    """Write a value and its interval."""
    return f"{value['value']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}"


def draw_gaps(gaps: Metrics, metric: str) -> Figure:
    """Draw a dot and its interval for each group's gap, around zero."""
    figure, ax = axes(8, 0.8 + 0.35 * len(gaps))
    ax.axvline(0, color=MUTED, lw=1)
    for i, value in enumerate(gaps.values()):
        ax.plot([value["low"], value["high"]], [i, i], color=ACCENT, lw=2.2, solid_capstyle="round")
        ax.plot(value["value"], i, "o", color=ACCENT, ms=7)
    ax.set_yticks(range(len(gaps)), list(gaps))
    ax.set_ylim(len(gaps) - 0.5, -0.5)
    ax.set_xlabel(f"{metric}, minus that of the others")
    return figure

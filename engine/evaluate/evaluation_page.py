"""The page of `manta evaluate`: metrics with intervals, calibration, confusion, slices, pairs, generated text, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.evaluate.bootstrap import INCONCLUSIVE
from engine.evaluate.frechet_distance import describe_images
from engine.evaluate.report import ACCENT, MUTED, axes, classification, code, picture, table, text, write_html

Metrics = dict[str, dict[str, float]]


def write_evaluation_page(folder: Path, content: dict[str, Any]) -> Path:
    """Write evaluation.html in `folder` from the content of evaluation.json; return its path."""
    records = content["bundles"]
    sections = []
    for record in records:
        prefix = f"{record['bundle']}: " if len(records) > 1 else ""
        sections += [(prefix + title, html) for title, html in record_sections(record)]
    lead = comparison(content["comparison"], [record["bundle"] for record in records]) if content["comparison"] else ""
    names = " and ".join(record["bundle"] for record in records)
    return write_html(folder / "evaluation.html", names, f"{names} on the {content['split']} split", lead, sections)


def record_sections(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the sections (title, HTML) of one bundle."""
    confidence = record["confidence"]
    sections = [("Metrics", metrics(record)), *classification(record["details"])]
    if record["slices"]:
        sections.append((f"By {record['slice_column']}", slices(record)))
    if record["pairs"]:
        sections.append(("Bias check over pairs of texts", pairs(record["pairs"], confidence)))
    if record["generation"]:
        sections.append(("Generated text", generation(record["generation"], confidence)))
    if record["images"]:
        sections.append(("Images", images(record["images"], confidence)))
    origin = [(key, code(record[key])) for key in ("hash", "data", "data_hash", "time")]
    return [*sections, ("Bundle and data", table(("", ""), origin))]


def comparison(result: dict[str, Any], names: list[str]) -> str:
    """State the result of a comparison."""
    if result["verdict"] == INCONCLUSIVE:
        statement = f"There is no significant difference between {text(names[0])} and {text(names[1])}"
    else:
        statement = f"{text(names[0])} is {text(result['verdict'])} than {text(names[1])}"
    return (
        f"<p class=verdict>{statement}: {text(result['metric'])} differs by {result['difference']:+.4f} "
        f"({result['low']:+.4f} to {result['high']:+.4f}, paired bootstrap on the same examples).</p>"
    )


def metrics(record: dict[str, Any]) -> str:
    """Return the table of the metrics."""
    rows = dict(record["metrics"])
    if record["majority"]:
        rows["accuracy of the majority class"] = record["majority"]
    return f"<p>{record['examples']:,} examples.</p>" + metrics_table(rows, record["confidence"])


def slices(record: dict[str, Any]) -> str:
    """Draw each group's difference from the others in the first metric, and list all metrics."""
    first_metric = next(iter(record["metrics"]))
    gaps = {group["group"]: group["gaps"][first_metric] for group in record["slices"]}
    parts = [picture(draw_gaps(gaps, first_metric))]
    interval = f"{100 * record['confidence']:g} % interval"
    head = ("metric", "value", interval, "minus the others", interval)
    for group in record["slices"]:
        rows = [(text(name), *cells(value), *cells(group["gaps"][name])) for name, value in group["metrics"].items()]
        parts.append(f"<p>{text(group['group'])}, {group['examples']:,} examples</p>" + table(head, rows))
    return "".join(parts)


def pairs(result: dict[str, Any], confidence: float) -> str:
    """List the metrics over the pairs and the pairs that are scored most differently."""
    rows = [
        (
            text(pair["a"]),
            text(pair["b"]),
            text(", ".join(f"{name} {score:+.3f}" for name, score in pair.items() if name not in ("a", "b"))),
        )
        for pair in result["extremes"]
    ]
    about = f"<p>{result['pairs']:,} pairs of {code(result['file'])}; the pairs with the largest shift:</p>"
    return metrics_table(result["metrics"], confidence) + about + table(("a", "b", "scores"), rows)


def generation(result: dict[str, Any], confidence: float) -> str:
    """List the metrics of the generated text and some examples."""
    rows = [(text(example["source"]), text(example["target"]), text(example["written"])) for example in result["shown"]]
    about = f"<p>{result['examples']:,} examples of {code(result['file'])}.</p>"
    return about + metrics_table(result["metrics"], confidence) + table(("source", "reference", "generated"), rows)


def images(result: dict[str, Any], confidence: float) -> str:
    """List the distances, and say which features they are computed with."""
    note = "Not comparable with published FIDs, which use Inception's features."
    return f"<p>{text(describe_images(result))}. {note}</p>" + metrics_table(result["metrics"], confidence)


def metrics_table(metrics: Metrics, confidence: float) -> str:
    """List metrics with their intervals."""
    rows = [(text(name), *cells(value)) for name, value in metrics.items()]
    return table(("metric", "value", f"{100 * confidence:g} % interval"), rows)


def cells(value: dict[str, float]) -> tuple[str, str]:
    """Return the cells of a value and its interval."""
    return f"{value['value']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}"


def draw_gaps(gaps: Metrics, metric: str) -> Figure:
    """Draw a dot with its interval for each group's difference from the others."""
    figure, ax = axes(8, 0.8 + 0.35 * len(gaps))
    ax.axvline(0, color=MUTED, lw=1)
    for i, value in enumerate(gaps.values()):
        ax.plot([value["low"], value["high"]], [i, i], color=ACCENT, lw=2.2, solid_capstyle="round")
        ax.plot(value["value"], i, "o", color=ACCENT, ms=7)
    ax.set_yticks(range(len(gaps)), list(gaps))
    ax.set_ylim(len(gaps) - 0.5, -0.5)
    ax.set_xlabel(f"{metric}, minus that of the others")
    return figure

"""Evaluations as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from engine.config import Config
from engine.evaluate.bootstrap import Interval
from engine.evaluate.evaluate import Evaluation
from engine.evaluate.slices import Slice


def metrics_table(names: Sequence[str], evaluations: Sequence[Evaluation], config: Config) -> Table:
    """Return the metrics of each bundle with their intervals."""
    table = Table("bundle", "metric", "value", f"{100 * config.evaluate.confidence:g} % interval", "examples")
    for name, evaluation in zip(names, evaluations, strict=True):
        parts = [("", evaluation.metrics, evaluation.examples)]
        if pairs := evaluation.pairs:
            parts.append(("pairs: ", pairs.metrics, pairs.pairs))
        if generation := evaluation.generation:
            parts.append(("generated: ", generation.metrics, generation.examples))
        if images := evaluation.images:
            parts.append((f"images, features of {images.features}: ", images.metrics, images.images))
        for prefix, metrics, examples in parts:
            for metric, interval in metrics.items():
                table.add_row(name, prefix + metric, *interval_cells(interval), f"{examples:,}")
        table.add_section()
    if (majority := evaluations[0].majority) is not None:
        table.add_row("majority class", "accuracy", *interval_cells(majority), f"{evaluations[0].examples:,}")
    return table


def slice_table(name: str, slices: Sequence[Slice], config: Config) -> Table:
    """Return the metrics of each group, and their differences from those of all other groups together."""
    column = config.evaluate.slice_column
    table = Table(
        str(column), "metric", "value", "minus the others", box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left",
        title=f"{name} by {column}, with {100 * config.evaluate.confidence:g} % intervals",
    )  # fmt: skip
    for group in slices:
        first_column = [group.group, f"{group.examples:,} examples"]
        for row, (metric, interval) in enumerate(group.metrics.items()):
            head = first_column[row] if row < len(first_column) else ""
            table.add_row(head, metric, _short(interval), _short(group.gaps[metric]))
    return table


def interval_cells(interval: Interval) -> tuple[str, str]:
    """Return the cells of a value and its interval."""
    return f"{interval.value:.4f}", f"{interval.low:.4f} to {interval.high:.4f}"


def _short(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"

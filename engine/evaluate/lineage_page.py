"""A bundle's lineage as a tree for the terminal and as a page with a diagram."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.tree import Tree

from engine.bundles.lineage import Lineage
from engine.evaluate.report import table, text, write_html

WIDTH, HEIGHT, GAP_X, GAP_Y = 190, 62, 40, 18  # of a node and between nodes, in pixels


@dataclass(frozen=True)
class Node:
    """One item of the lineage."""

    kind: str
    title: str
    details: str
    column: int  # from the left
    parents: tuple[int, ...] = ()  # indices of the nodes that lead to it


def lineage_tree(lineage: Lineage) -> Tree:
    """Return the tree, from the first data to the deployments."""
    trees: list[Tree] = []
    root: Tree | None = None
    for node in lineage_nodes(lineage):
        label = f"[bold]{node.kind}[/] {escape(node.title)}" + (
            f"  [dim]{escape(node.details)}[/]" if node.details else ""
        )
        parent = trees[node.parents[-1]] if node.parents else root
        trees.append(parent.add(label) if parent else Tree(label))
        root = root or trees[0]
    assert root is not None
    return root


def lineage_nodes(lineage: Lineage) -> list[Node]:
    """Return the nodes in order of time, each after its parents."""
    nodes: list[Node] = []
    bundle = _add_bundle_nodes(lineage, nodes)
    column = nodes[bundle].column + 1
    for evaluation in lineage.evaluations:
        metric, value = next(iter(evaluation["metrics"].items()))
        details = f"{metric} {value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
        title = f"{evaluation.get('split', 'test')} of {Path(evaluation['data']).name}"
        nodes.append(Node("evaluation", title, details, column, (bundle,)))
    for version in lineage.versions:
        nodes.append(Node("version", str(version), ", ".join(version.aliases), column, (bundle,)))
    for deployment in lineage.deployments:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(deployment["since"]))
        details = f"{'running' if deployment['up'] else 'down'}, since {since}"
        nodes.append(Node("deployment", f"{deployment['name']} at {deployment['url']}", details, column + 1, (bundle,)))
    return nodes


def _add_bundle_nodes(lineage: Lineage, nodes: list[Node]) -> int:
    """Add the nodes up to a bundle; return the bundle's index."""
    parents: list[int] = []
    if lineage.parent:
        parents.append(_add_bundle_nodes(lineage.parent, nodes))
    column = nodes[parents[0]].column + 1 if parents else 0
    if lineage.data:
        manifest = lineage.data.manifest
        details = (
            f"{manifest.splits['train']['documents']:,} documents, license {manifest.license}"
            if manifest
            else "not found"
        )
        title, details = lineage.data.folder.name, f"{lineage.data.hash[:12]}  {details}"
        nodes.append(Node("data", title, details, max(column - 1, 0)))
        parents.insert(0, len(nodes) - 1)
        column = max(column, nodes[-1].column + 1)
    if lineage.training:
        run = lineage.training
        if run.sweep:
            nodes.append(Node("sweep", run.sweep, f"{run.num_trials} trials", column, tuple(parents)))
            parents, column = [len(nodes) - 1], column + 1
        kind = "trial" if run.sweep else run.job
        nodes.append(Node(kind, run.name, f"step {run.step:,}", column, tuple(parents)))
        parents, column = [len(nodes) - 1], column + 1
    nodes.append(Node("bundle", lineage.name, lineage.bundle.hash[:12], column, tuple(parents)))
    return len(nodes) - 1


def write_lineage_page(file: Path, lineage: Lineage) -> Path:
    """Write the page; return its path."""
    problems = lineage.all_problems()
    lead = (
        f"<p class=verdict>Incomplete: {text('; '.join(problems))}</p>"
        if problems
        else "<p class=verdict>Complete: every step was found, and every hash matches.</p>"
    )
    nodes = lineage_nodes(lineage)
    rows = [(text(node.kind), text(node.title), text(node.details)) for node in nodes]
    sections = [("Diagram", draw(nodes)), ("List", table(("", "name", "details"), rows))]
    return write_html(file, lineage.name, f"Lineage of {lineage.name}", lead, sections)


def draw(nodes: list[Node]) -> str:
    """Return the nodes as inline SVG: time runs to the right, nodes of one column are stacked."""
    positions: list[tuple[float, float]] = []
    rows_used: dict[int, int] = {}
    for node in nodes:
        row = rows_used.get(node.column, 0)
        rows_used[node.column] = row + 1
        positions.append((node.column * (WIDTH + GAP_X), row * (HEIGHT + GAP_Y)))
    width = max(x for x, _ in positions) + WIDTH + 2
    height = max(y for _, y in positions) + HEIGHT + 2
    parts = []
    for node, (x, y) in zip(nodes, positions, strict=True):
        for parent in node.parents:
            from_x, from_y = positions[parent][0] + WIDTH, positions[parent][1] + HEIGHT / 2
            to_y, middle = y + HEIGHT / 2, (from_x + x) / 2
            parts.append(
                f"<path d='M{from_x},{from_y} C{middle},{from_y} {middle},{to_y} {x},{to_y}' fill='none' stroke='var(--mute)'/>"
            )
    for node, (x, y) in zip(nodes, positions, strict=True):
        parts.append(
            f"<rect x='{x + 1}' y='{y + 1}' width='{WIDTH - 2}' height='{HEIGHT - 2}' rx='6' fill='var(--soft)' stroke='var(--line)'/>"
            + _text_line(x, y + 18, "var(--blue)", node.kind)
            + _text_line(x, y + 35, "var(--ink)", node.title)
            + _text_line(x, y + 51, "var(--mute)", node.details)
        )
    return f"<div class=wide><svg viewBox='0 0 {width:.0f} {height:.0f}' style='min-width:{width * 0.7:.0f}px'>{''.join(parts)}</svg></div>"


def _text_line(x: float, y: float, color: str, content: str, max_length: int = 30) -> str:
    shown = content if len(content) <= max_length else content[: max_length - 1] + "…"
    return (
        f"<text x='{x + 10}' y='{y}' font-size='11' fill='{color}'>{text(shown)}<title>{text(content)}</title></text>"
    )

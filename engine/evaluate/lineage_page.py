"""A bundle's lineage as a tree for the terminal and as a page with a picture."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.tree import Tree

from engine.bundles.lineage import Lineage
from engine.evaluate.report import table, text, write_html

WIDTH, HEIGHT, ACROSS, DOWN = 190, 62, 40, 18  # of a box and between boxes, in pixels


@dataclass(frozen=True)
class Node:
    """One thing in the picture, `column` steps from the left."""

    kind: str
    title: str
    about: str
    column: int
    before: tuple[int, ...] = ()  # numbers of the boxes that lead to it


def lineage_tree(life: Lineage) -> Tree:
    """Return the tree, from the first data to the endpoints."""
    boxes = lineage_nodes(life)
    trees: list[Tree] = []
    root: Tree | None = None
    for box in boxes:
        label = f"[bold]{box.kind}[/] {escape(box.title)}" + (f"  [dim]{escape(box.about)}[/]" if box.about else "")
        below = trees[box.before[-1]] if box.before else root
        trees.append(below.add(label) if below else Tree(label))
        root = root or trees[0]
    assert root is not None
    return root


def lineage_nodes(life: Lineage) -> list[Node]:
    """Return the boxes in the order of time, each after those that lead to it."""
    boxes: list[Node] = []
    end = _bundle_boxes(life, boxes)
    column = boxes[end].column
    first = end
    for found in life.evaluations:
        metric, value = next(iter(found["metrics"].items()))
        told = f"{metric} {value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
        boxes.append(
            Node("evaluation", f"{found.get('split', 'test')} of {Path(found['data']).name}", told, column + 1, (first,))
        )
    for version in life.versions:
        boxes.append(Node("version", str(version), ", ".join(version.aliases), column + 1, (first,)))
    for found in life.deployments:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(found["since"]))
        state = "up now" if found["up"] else "down"
        boxes.append(
            Node("deployment", f"{found['name']} at {found['url']}", f"{state}, since {since}", column + 2, (first,))
        )
    return boxes


def _bundle_boxes(life: Lineage, boxes: list[Node]) -> int:
    """Add the boxes up to a bundle; return its number."""
    before: list[int] = []
    if life.parent:
        before.append(_bundle_boxes(life.parent, boxes))
    column = boxes[before[0]].column + 1 if before else 0
    if life.data:
        manifest = life.data.manifest
        about = (
            f"{manifest.splits['train']['documents']:,} documents, license {manifest.license}"
            if manifest
            else "not to be found"
        )
        place = Node("data", life.data.folder.name, f"{life.data.hash[:12]}  {about}", max(column - 1, 0))
        boxes.append(place)
        before.insert(0, len(boxes) - 1)
        column = max(column, place.column + 1)
    if life.training:
        run = life.training
        if run.sweep:
            boxes.append(Node("sweep", run.sweep, f"{run.trials} trials", column, tuple(before)))
            before, column = [len(boxes) - 1], column + 1
        kind = "trial" if run.sweep else run.job
        boxes.append(Node(kind, run.name, f"step {run.step:,}", column, tuple(before)))
        before, column = [len(boxes) - 1], column + 1
    boxes.append(Node("bundle", life.name, life.bundle.hash[:12], column, tuple(before)))
    return len(boxes) - 1


def write_lineage_page(file: Path, life: Lineage) -> Path:
    """Write the page; return its path."""
    faults = life.all_problems()
    told = (
        f"<p class=verdict>Not whole: {text('; '.join(faults))}</p>"
        if faults
        else "<p class=verdict>Whole: each step was found, and each hash is right.</p>"
    )
    rows = [(text(box.kind), text(box.title), text(box.about)) for box in lineage_nodes(life)]
    sections = [("Picture", draw(lineage_nodes(life))), ("List", table(("", "what", "about"), rows))]
    return write_html(file, life.name, f"{life.name}: where it came from", told, sections)


def draw(boxes: list[Node]) -> str:
    """Return the boxes as inline SVG: time goes to the right, boxes of one column lie under each other."""
    places: list[tuple[float, float]] = []
    filled: dict[int, int] = {}
    for box in boxes:
        row = filled.get(box.column, 0)
        filled[box.column] = row + 1
        places.append((box.column * (WIDTH + ACROSS), row * (HEIGHT + DOWN)))
    width = max(x for x, _ in places) + WIDTH + 2
    height = max(y for _, y in places) + HEIGHT + 2
    parts = []
    for box, (x, y) in zip(boxes, places, strict=True):
        for number in box.before:
            from_x, from_y = places[number][0] + WIDTH, places[number][1] + HEIGHT / 2
            to_y, middle = y + HEIGHT / 2, (from_x + x) / 2
            parts.append(
                f"<path d='M{from_x},{from_y} C{middle},{from_y} {middle},{to_y} {x},{to_y}' fill='none' stroke='var(--mute)'/>"
            )
    for box, (x, y) in zip(boxes, places, strict=True):
        parts.append(
            f"<rect x='{x + 1}' y='{y + 1}' width='{WIDTH - 2}' height='{HEIGHT - 2}' rx='6' fill='var(--soft)' stroke='var(--line)'/>"
            + _line(x, y + 18, "var(--blue)", box.kind)
            + _line(x, y + 35, "var(--ink)", box.title)
            + _line(x, y + 51, "var(--mute)", box.about)
        )
    return f"<div class=wide><svg viewBox='0 0 {width:.0f} {height:.0f}' style='min-width:{width * 0.7:.0f}px'>{''.join(parts)}</svg></div>"


def _line(x: float, y: float, colour: str, words: str, most: int = 30) -> str:
    cut = words if len(words) <= most else words[: most - 1] + "…"
    return f"<text x='{x + 10}' y='{y}' font-size='11' fill='{colour}'>{text(cut)}<title>{text(words)}</title></text>"

"""A new objective, kind of data, searcher or schedule is found by its file: no list of names is kept anywhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from engine.config.option import names_in
from engine.data.kinds import kind_classes
from engine.objectives.contract import objective_names

ROOT = Path(__file__).parents[1]
OWN_FOLDERS = ("engine/objectives", "engine/data/kinds", "engine/sweep/searchers", "engine/train/schedules")


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("engine", "jobs", "cluster"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(OWN_FOLDERS):
                yield name, ast.parse(path.read_text("utf-8"))


def docstrings(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }


def collections_of(tree: ast.Module, names: set[str]) -> Iterator[tuple[int, set[str]]]:
    """Yield line and names of each tuple, list, set or dict that holds two or more of the names."""
    for node in ast.walk(tree):
        elements: list[ast.expr] = []
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            elements = node.elts
        elif isinstance(node, ast.Dict):
            elements = [key for key in node.keys if key is not None]
        held = {e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)} & names
        if len(held) > 1:
            yield node.lineno, held


def test_no_other_file_lists_their_names() -> None:
    groups = [set(objective_names()), set(kind_classes()), set(names_in("engine/sweep/searchers")), set(names_in("engine/train/schedules"))]  # fmt: skip
    found = [
        f"{name}:{line}: {sorted(held)}"
        for name, tree in sources()
        for names in groups
        for line, held in collections_of(tree, names)
    ]
    assert not found, "declare it in the objective, the kind of data, the searcher or the schedule:\n" + "\n".join(
        found
    )


def test_no_sentence_lists_objectives() -> None:
    names = [name for name in objective_names() if "_" in name]  # the others are English words, too
    pattern = re.compile(r"\b(" + "|".join(names) + r")\b")
    found = []
    for name, tree in sources():
        ignored = docstrings(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in ignored:
                continue
            if len(listed := set(pattern.findall(node.value))) > 1:
                found.append(f"{name}:{node.lineno}: {sorted(listed)}")
    assert not found, "make the list from `objective_names` or a declaration of the objectives:\n" + "\n".join(found)


def test_no_other_file_compares_a_kind_of_data() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and isinstance(node.left, ast.Attribute)
        and node.left.attr in ("data_kind", "kind")
        and any(
            isinstance(constant, ast.Constant) and constant.value in kind_classes()
            for side in node.comparators
            for constant in ast.walk(side)
        )
    ]
    assert not found, "ask the kind of data for a property of it:\n" + "\n".join(found)

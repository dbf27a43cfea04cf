"""What the papers (README.md and its kin) name is there: files, options, anchors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config import Config, get

ROOT = Path(__file__).parents[1]
PAPERS = sorted(
    path for path in (*ROOT.rglob("*.md"), *(ROOT / ".github").rglob("*.md"))
    if not {".venv", "runs", "node_modules", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)  # fmt: skip


@pytest.mark.parametrize("paper", sorted({*PAPERS}), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_paper_names_exist(paper: Path) -> None:
    text = paper.read_text()
    named = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|h|cpp|sh))`", text)
    named += re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    last = paper.parent
    for name in named:
        places = [base / name for base in (paper.parent, ROOT, ROOT / "engine", last)]
        there = [place for place in places if place.exists()]
        assert there, f"{paper.relative_to(ROOT)} names {name}"
        last = there[0].parent  # `a/b.py`, `c.py`: the second lies beside the first


@pytest.mark.parametrize("paper", sorted({*PAPERS}), ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_a_paper_names_exist(paper: Path) -> None:
    groups = (
        "data|model|objective|optim|schedule|zero|train|sweep|evaluate|serve|improve|plan|convert|cluster|tracking|demo"
    )
    for line in paper.read_text().splitlines():
        if paper.name == "CHANGELOG.md" and line.lstrip().startswith("|"):
            continue  # the table of former names
        for key in re.findall(rf"(?<![\w./-])((?:{groups})\.[a-z_.]+)=", line):
            get(Config(), key)

"""Configs over small real data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import Config, DataConfig, replace
from engine.data.corpus import SPLITS, Document, parts
from engine.data.scan import DROPPED, choose, scan_part

SHARED = Path(__file__).parents[4] / "shared" / "data"


def documents(config: DataConfig, seed: int, counts: Counter[str]) -> list[Document]:
    """Return what is kept of a corpus, in order; add what is left out to `counts`, by reason."""
    corpus, held = parts(config), list[Document]()
    surveys = [scan_part(part, seed, 0, held=held) for part in corpus]
    splits, skipped = choose(corpus, surveys, seed)
    counts.update(sum([*skipped.values(), *(found.skipped for found in surveys)], Counter[str]()))
    numbered = zip(held, (int(number) for one in splits for number in one), strict=True)
    return [dataclasses.replace(document, split=SPLITS[number]) for document, number in numbered if number != DROPPED]


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    """Return a function of data options -> a config whose runs are in the test's own folder."""
    return lambda **options: replace(
        Config(), runs_dir=str(tmp_path / "runs"), **{f"data__{key}": value for key, value in options.items()}
    )


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Return a function of a name -> a file of the real data beside the project; skips where it is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"the real data ../shared/data/{name} is not beside this checkout")
        return SHARED / name

    return find

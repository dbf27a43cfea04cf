"""Configs over small real data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.config import Config, DataConfig, replace
from engine.data.corpus import list_parts
from engine.data.document import SPLITS, Document
from engine.data.scan import DROPPED, assign_splits, scan_part

SHARED = Path(__file__).parents[4] / "shared" / "data"


def documents(config: DataConfig, seed: int, counts: Counter[str]) -> list[Document]:
    """Return the documents of a corpus that are kept, in order; add those that are skipped to `counts`, by reason."""
    corpus, found = list_parts(config), list[Document]()
    scans = [scan_part(part, seed, 0, documents=found) for part in corpus]
    splits, skipped = assign_splits(corpus, scans, seed)
    counts.update(sum([*skipped.values(), *(scan.skipped for scan in scans)], Counter[str]()))
    numbered = zip(found, (int(number) for numbers in splits for number in numbers), strict=True)
    return [dataclasses.replace(document, split=SPLITS[number]) for document, number in numbered if number != DROPPED]


@pytest.fixture
def rows() -> list[np.ndarray]:
    """Return tokens of eleven documents, 688 in all."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, 5000, size) for size in [3, 40, 57, 1, 99, 100, 250, 12, 7, 88, 31]]


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    """Return a function of data options -> a config with runs_dir in the test's temporary folder."""
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

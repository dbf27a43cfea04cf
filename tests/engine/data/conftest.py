"""Configs over small real data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import Config, replace

SHARED = Path(__file__).parents[4] / "shared" / "data"


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

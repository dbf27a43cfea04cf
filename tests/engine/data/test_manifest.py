from pathlib import Path

import numpy as np
import pytest

from engine.data.manifest import Manifest
from engine.data.shards import Split
from engine.errors import UserError
from tests.engine.data.test_shards import write


def test_a_missing_or_short_shard_is_named(tmp_path: Path, rows: list[np.ndarray]) -> None:
    folder = write(tmp_path, rows)
    path = folder / "train-00001.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"train-00001\.arrow is [\d,]+ bytes long, not"):
        Split.open(folder, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001\.arrow is missing"):
        Manifest.load(folder)


def test_missing_folders_and_splits(tmp_path: Path, rows: list[np.ndarray]) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        Split.open(tmp_path, "train")
    with pytest.raises(UserError, match=r"no test documents: .*data\.test_path"):
        Split.open(write(tmp_path, rows), "test")
    (tmp_path / "manifest.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match="is damaged"):
        Manifest.load(tmp_path)

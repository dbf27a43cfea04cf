from pathlib import Path

import numpy as np
import pytest

from engine.data.manifest import Manifest
from engine.data.remote_store import verify
from engine.errors import UserError
from tests.engine.data.test_shards import write


def test_a_flipped_byte_is_named(tmp_path: Path, rows: list[np.ndarray]) -> None:
    folder = write(tmp_path, rows)
    assert verify(folder).hash == Manifest.load(folder).content_hash()
    path = folder / "train-00002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00002\.arrow was changed"):
        verify(folder)

from pathlib import Path

import numpy as np
import pytest

from engine.data.kinds.labeled_text import LabeledRows
from engine.data.packing import Packing, pack
from engine.data.shards import Split
from engine.errors import UserError
from tests.engine.data.test_shards import write


def test_rows_keep_their_closing_tokens(tmp_path: Path, rows: list[np.ndarray]) -> None:
    labels = [i % 2 for i in range(len(rows))]
    split = Split.open(write(tmp_path, rows, labels, closing=1), "train")
    samples = LabeledRows(split, 50)
    assert len(samples) == 11
    assert [samples[i]["label"] for i in range(11)] == labels == split.labels.tolist()
    assert samples[0]["tokens"].tolist() == rows[0].tolist()
    assert samples[6]["tokens"].tolist() == [*rows[6][:49], rows[6][-1]]
    with pytest.raises(UserError, match="texts with labels, which are not packed"):
        pack(split, 8, Packing(), overlap=1)
    with pytest.raises(UserError, match="has no labels"):
        LabeledRows(Split.open(write(tmp_path, rows), "train"), 8)

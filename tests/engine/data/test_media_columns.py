from collections import Counter
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from engine.data.input_files import InputFile
from engine.data.media_columns import decode_rows, read_bytes


def test_rows_keep_their_order_and_reasons_are_counted() -> None:
    counts: Counter[str] = Counter()
    decoded = decode_rows(
        ({"i": i} for i in range(1000)), lambda row: (row["i"],) if row["i"] % 10 else "without an image", counts
    )
    assert [i for (i,) in decoded] == [i for i in range(1000) if i % 10]
    assert counts == {"without an image": 100}


def test_bytes_are_in_the_row_or_in_a_file_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"one")
    table = InputFile(str(tmp_path / "train.parquet"), "train.parquet", None, 0, "", LocalFileSystem())
    assert read_bytes(b"two", table) == b"two"
    assert read_bytes({"bytes": b"three", "path": "images/1.png"}, table) == b"three"
    assert read_bytes({"bytes": None, "path": "images/1.png"}, table) == read_bytes("images/1.png", table) == b"one"
    assert read_bytes("images/2.png", table) is None
    assert read_bytes(None, table) is None

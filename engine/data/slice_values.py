"""The value of a column for each row of a prepared split, by which an evaluation is sliced."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.data.document import Piece
from engine.data.file_formats import AnyColumns, format_of, read_rows
from engine.data.input_files import InputFile, list_files
from engine.data.shards import Split
from engine.errors import UserError


def read_slice_values(config: DataConfig, column: str, split: Split, tokenizer: Any) -> list[str]:
    """Return the column's value for each row of `split`, in its order.

    Shards hold tokens, not columns, so the files are read again and rows are matched by their tokens. Of rows with equal
    text, which are deduplicated when data are prepared, the first one's value counts. Raises UserError where the data have
    no such column, or a row has no value.
    """
    if config.source != "files":
        raise UserError(f"data.source={config.source} has no columns: evaluate.slice_column needs files that have them")
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    value_of: dict[bytes, str] = {}
    for file in list_files(config):
        for texts, values in _batches(file, config, column):
            for ids, value in zip(tokenizer(texts)["input_ids"], values, strict=True):
                value_of.setdefault(_digest(ids, special), value)
    slice_values = [value_of.get(_digest(split.document(i), special)) for i in range(split.num_rows)]
    if missing := sum(value is None for value in slice_values):
        raise UserError(
            f"{missing:,} of the {split.num_rows:,} {split.name} rows have nothing in column '{column}': fill it, or leave them out"
        )
    return [value for value in slice_values if value is not None]


def _digest(ids: Sequence[int] | np.ndarray, special: np.ndarray) -> bytes:
    kept = np.asarray(ids, dtype=np.int64)
    return hashlib.blake2b(kept[~np.isin(kept, special)].tobytes(), digest_size=16).digest()


def _batches(
    file: InputFile, config: DataConfig, column: str, size: int = 1024
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (texts, values) of the rows of a file that have both."""
    texts: list[str] = []
    values: list[str] = []
    reader = AnyColumns({config.text_column: "data.text_column", column: "evaluate.slice_column"})
    file_format = format_of(file.name) if config.format == "auto" else config.format
    for row in read_rows(Piece(file, file_format, 0, None, file.size), reader, Counter()):
        text, value = row.get(config.text_column), row.get(column)
        if isinstance(text, str) and value not in (None, ""):
            texts.append(text)
            values.append(str(value))
        if len(texts) == size:
            yield texts, values
            texts, values = [], []
    if texts:
        yield texts, values

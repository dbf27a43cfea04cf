"""The value of a column for each row of a prepared split, by which an evaluation is sliced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.data.input_files import InputFile, list_files, strip_compression_suffix
from engine.data.shards import Split
from engine.errors import UserError, did_you_mean


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
    found = [value_of.get(_digest(split.document(i), special)) for i in range(split.num_rows)]
    if missing := sum(value is None for value in found):
        raise UserError(
            f"{missing:,} of the {split.num_rows:,} {split.name} rows have nothing in column '{column}': fill it, or leave them out"
        )
    return [value for value in found if value is not None]


def _digest(ids: Sequence[int] | np.ndarray, special: np.ndarray) -> bytes:
    kept = np.asarray(ids, dtype=np.int64)
    return hashlib.blake2b(kept[~np.isin(kept, special)].tobytes(), digest_size=16).digest()


def _batches(
    file: InputFile, config: DataConfig, column: str, size: int = 1024
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (texts, values) of the rows of a file that have both."""
    texts: list[str] = []
    values: list[str] = []
    for row in _rows(file, config, column):
        text, value = row.get(config.text_column), row.get(column)
        if isinstance(text, str) and value not in (None, ""):
            texts.append(text)
            values.append(str(value))
        if len(texts) == size:
            yield texts, values
            texts, values = [], []
    if texts:
        yield texts, values


def _rows(file: InputFile, config: DataConfig, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = strip_compression_suffix(file.name).lower()
    with file.open() as opened:
        if config.format == "parquet" or name.endswith(".parquet"):
            table = pq.ParquetFile(opened)
            _require_column(file, column, table.schema_arrow.names)
            for batch in table.iter_batches(columns=[config.text_column, column]):
                yield from batch.to_pylist()
        elif config.format == "arrow" or name.endswith(".arrow"):
            table = pa.ipc.open_file(opened).read_all()
            _require_column(file, column, table.schema.names)
            yield from table.select([config.text_column, column]).to_pylist()
        else:
            checked = False
            for line in opened:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # skipped when the data were prepared, too
                if not isinstance(row, dict):
                    continue
                if not checked:
                    _require_column(file, column, list(row))
                    checked = True
                yield row


def _require_column(file: InputFile, column: str, names: list[str]) -> None:
    if column not in names:
        raise UserError(
            f"{file.address} has no column '{column}' (evaluate.slice_column), only {', '.join(names)}{did_you_mean(column, names)}"
        )

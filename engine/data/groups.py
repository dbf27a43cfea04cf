"""The group of each row of a prepared split, by a column of the files that it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.config import DataConfig
from engine.data.inputs import File, bare, list_files
from engine.data.shards import Split
from engine.errors import UserError, nearest


def groups_of(config: DataConfig, column: str, split: Split, tokenizer: Any) -> list[str]:
    """Return the group of each row of `split`, in its order.

    The shards hold tokens, not columns, so the files are read again and a row is known by its tokens: those of two rows
    with the same text are the same, and such rows were taken once. Of these the first row's group holds. Raises UserError
    where the data have no such column, or a row has no group.
    """
    if config.source != "files":
        raise UserError(f"data.source={config.source} has no columns: evaluate.slice_column needs files that have them")
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    group: dict[bytes, str] = {}
    for file in list_files(config):
        for texts, values in _batches(file, config, column):
            for ids, value in zip(tokenizer(texts)["input_ids"], values, strict=True):
                group.setdefault(_digest(ids, special), value)
    found = [group.get(_digest(split.document(i), special)) for i in range(split.rows)]
    if lacking := sum(value is None for value in found):
        raise UserError(
            f"{lacking:,} of the {split.rows:,} {split.name} rows have nothing in column '{column}': fill it, or leave them out"
        )
    return [value for value in found if value is not None]


def _digest(ids: Sequence[int] | np.ndarray, special: np.ndarray) -> bytes:
    kept = np.asarray(ids, dtype=np.int64)
    return hashlib.blake2b(kept[~np.isin(kept, special)].tobytes(), digest_size=16).digest()


def _batches(file: File, config: DataConfig, column: str, size: int = 1024) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (texts, groups) of the rows of a file that have both."""
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


def _rows(file: File, config: DataConfig, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = bare(file.name).lower()
    with file.open() as opened:
        if config.format == "parquet" or name.endswith(".parquet"):
            table = pq.ParquetFile(opened)
            _need(file, column, table.schema_arrow.names)
            for batch in table.iter_batches(columns=[config.text_column, column]):
                yield from batch.to_pylist()
        elif config.format == "arrow" or name.endswith(".arrow"):
            table = pa.ipc.open_file(opened).read_all()
            _need(file, column, table.schema.names)
            yield from table.select([config.text_column, column]).to_pylist()
        else:
            seen = False
            for line in opened:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # left out when the data were prepared too
                if not isinstance(row, dict):
                    continue
                if not seen:
                    _need(file, column, list(row))
                    seen = True
                yield row


def _need(file: File, column: str, there: list[str]) -> None:
    if column not in there:
        raise UserError(
            f"{file.place} has no column '{column}' (evaluate.slice_column), only {', '.join(there)}{nearest(column, there)}"
        )

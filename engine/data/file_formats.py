"""Formats of input files: text, JSON lines, Parquet and Arrow, compressed or not, complete or a range of one."""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Protocol

from engine.data.document import Piece
from engine.data.input_files import InputFile, strip_compression_suffix
from engine.errors import UserError, did_you_mean

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
UNREADABLE_SUFFIXES = (".bz2", ".xz", ".zip", ".7z", ".rar", ".lz4", ".tar", ".tgz")
PARAGRAPHS = (
    4096  # characters after which the next blank line ends a document; after four times that, the next line does
)
BATCH_ROWS = 4096  # of a Parquet file, read at once


class TableReader(Protocol):
    """What is read of a table: a `DataKind`, or anything with the columns and a check of their types."""

    @property
    def columns(self) -> dict[str, str]:
        """The columns, and for each the option that names it."""

    def check_schema(self, address: str, schema: Any) -> None:
        """Raise UserError for columns of types that cannot be used."""


@dataclass(frozen=True)
class AnyColumns:
    """A reader of columns of any type."""

    columns: dict[str, str]

    def check_schema(self, address: str, schema: Any) -> None:
        """Accept every type."""


def format_of(name: str) -> str:
    """Return the format of a file by its suffix; text where it is unknown."""
    return SUFFIXES.get(PurePosixPath(strip_compression_suffix(name)).suffix.lower(), "text")


def split_points(file: InputFile, file_format: str, by_paragraph: bool, size: int) -> list[int]:
    """Return where to split a large file: at bytes of text and JSON lines, row groups of Parquet, record batches of Arrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file_format == "jsonl" or by_paragraph:
        return list(range(size, file.size, size))
    try:
        with file.open() as opened:
            if file_format == "parquet":
                metadata = pq.ParquetFile(opened).metadata
                weights = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
            elif file_format == "arrow":
                count = pa.ipc.open_file(opened).num_record_batches
                weights = [file.size // max(count, 1)] * count
            else:
                return []
    except pa.ArrowInvalid:  # an Arrow stream has no index to split it by; a damaged file is reported when it is read
        return []
    points, size_so_far = [], 0
    for i, weight in enumerate(weights[:-1]):
        size_so_far += weight
        if size_so_far >= size:
            points.append(i + 1)
            size_so_far = 0
    return points


def read_texts(piece: Piece, counts: Counter[str]) -> Iterator[str]:
    """Yield a text file as one text or in runs of paragraphs; count what is no text, by reason."""
    if piece.file.name.lower().endswith(UNREADABLE_SUFFIXES):
        counts["packed, but not as .gz or .zst"] += 1
        return
    if not piece.by_paragraph:
        with piece.file.open() as opened:
            content = opened.read()
        if problem := _why_not_text([content]):
            counts[problem] += 1
            return
        text = content.decode("utf-8-sig")
        yield _unix_newlines(text) if "\r" in text else text
        return
    with piece.file.open() as opened:
        problem = _why_not_text(_lines(opened, piece))
    if problem:
        counts[problem] += 1
        return
    with piece.file.open() as opened:
        lines = (_unix_newlines(line.decode("utf-8-sig")) for line in _lines(opened, piece))
        yield from _paragraphs(lines, piece.start == 0)


def read_rows(piece: Piece, reader: TableReader, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield a table's rows with the columns that the reader needs. Raises UserError for a file that cannot be read so."""
    return _json_rows(piece, reader.columns, counts) if piece.format == "jsonl" else _table_rows(piece, reader)


def require_columns(address: str, wanted: Mapping[str, str], available: Iterable[str]) -> None:
    """Raise UserError for a column that is missing, naming the option that asks for it."""
    names = list(available)
    for column, option in wanted.items():
        if column not in names:
            hint = did_you_mean(column, names) or f": set {option} to one of them"
            raise UserError(f"{address} has no column '{column}' ({option}), only {', '.join(names) or 'none'}{hint}")


def check_text_column(address: str, column: str, schema: Any) -> None:
    """Raise UserError where a column of an Arrow schema holds no text."""
    import pyarrow.types as types

    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
        others = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        raise UserError(
            f"column '{column}' of {address} holds {kind}, not text: "
            + (f"name another with data.text_column ({', '.join(others)})" if others else "write it as strings")
        )


def _lines(opened: IO[bytes], piece: Piece) -> Iterator[bytes]:
    """Yield the lines that begin in the piece."""
    if not piece.start and piece.stop is None:
        yield from opened
        return
    position = max(piece.start - 1, 0)
    opened.seek(position)
    if piece.start:
        position += len(opened.readline())  # the rest of a line that began before the piece, or just its line break
    while (piece.stop is None or position < piece.stop) and (line := opened.readline()):
        yield line
        position += len(line)


def _unix_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _why_not_text(lines: Iterable[bytes]) -> str | None:
    """Return why the bytes are no UTF-8 text, or None where they are."""
    try:
        for line in lines:
            if b"\0" in line:
                return "not UTF-8" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "binary"
            line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def _paragraphs(lines: Iterable[str], first: bool) -> Iterator[str]:
    """Split at the first blank line after PARAGRAPHS characters or, in text without any, at a line end.

    The first piece of a file has at least one document, perhaps an empty one; a later piece in which no line begins has none.
    """
    pending: list[str] = []
    size, count = 0, 0
    for line in lines:
        pending.append(line)
        size += len(line)
        if size >= PARAGRAPHS and (not line.strip() or size >= 4 * PARAGRAPHS):
            yield "".join(pending)
            pending, size, count = [], 0, count + 1
    if pending or (first and not count):
        yield "".join(pending)


def _json_rows(piece: Piece, columns: dict[str, str], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    any_valid, first_malformed = False, 0
    with piece.file.open() as opened:
        for number, line in enumerate(_lines(opened, piece), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                row = None
            if not isinstance(row, dict):
                counts["malformed line"] += 1
                first_malformed = first_malformed or number
                continue
            if not any_valid:
                require_columns(piece.file.address, columns, row)
                any_valid = True
            yield row
    if first_malformed and not any_valid and not piece.start and piece.stop is None:
        raise UserError(
            f"no line of {piece.file.address} is a JSON object (the first malformed one is line {first_malformed}): "
            "write one object a line, in UTF-8 (jq -c '.[]' does it to an array), or set data.format=text"
        )


def _table_rows(piece: Piece, reader: TableReader) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with piece.file.open() as opened:
        if piece.file.is_compressed:
            opened = io.BytesIO(opened.read())  # a table's footer is read first
        try:
            if piece.format == "parquet":
                table = pq.ParquetFile(opened)
                _check_table(piece.file.address, reader, table.schema_arrow)
                groups = range(table.num_row_groups)[piece.start : piece.stop]
                batches: Iterable[pa.RecordBatch] = table.iter_batches(BATCH_ROWS, list(groups), list(reader.columns))
            else:
                batches = _arrow_batches(piece, opened, reader)
            for batch in batches:
                yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{piece.file.address} is no {piece.format} file ({error}): repair it or set data.format"
            ) from error


def _arrow_batches(piece: Piece, opened: IO[bytes], reader: TableReader) -> Iterator[Any]:
    """Read both of Arrow's layouts: the IPC file, and the stream that `datasets` writes."""
    import pyarrow as pa

    try:
        indexed = pa.ipc.open_file(opened)
        numbers = range(indexed.num_record_batches)[piece.start : piece.stop]
        batches: Iterable[pa.RecordBatch] = (indexed.get_batch(i) for i in numbers)
        schema = indexed.schema
    except pa.ArrowInvalid:
        opened.seek(0)
        stream = pa.ipc.open_stream(opened)
        batches, schema = stream, stream.schema
    _check_table(piece.file.address, reader, schema)
    yield from (batch.select(list(reader.columns)) for batch in batches)


def _check_table(address: str, reader: TableReader, schema: Any) -> None:
    """Raise UserError for a column that is missing, that is there twice, or whose type cannot be used."""
    require_columns(address, reader.columns, schema.names)
    for name, option in reader.columns.items():
        if schema.names.count(name) > 1:
            raise UserError(f"{address} has {schema.names.count(name)} columns '{name}' ({option}): rename all but one")
    reader.check_schema(address, schema)

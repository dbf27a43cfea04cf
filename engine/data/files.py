"""Reader of data.source=files: files, folders and globs, local or in object storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from engine.config import DataConfig
from engine.data.document import Document, Part, Piece, split_of
from engine.data.file_formats import AnyColumns, format_of, read_rows, read_texts, split_points
from engine.data.input_files import list_files, strip_compression_suffix
from engine.data.kinds import DataKind, Row, kind_of, matching_kinds
from engine.errors import UserError

FEW_FILES = 20  # fewer text files than this are split at paragraphs, since no share of so few can be held out


def read(part: Part, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a part.

    A row (or file, or run of paragraphs) goes to a split by a hash of its file's name, its number and the seed, unless
    its file was given for one split.
    """
    config = part.config
    for piece in part.pieces:
        file = piece.file
        if piece.format == "text":
            rows: Iterable[Row] = (Row(text) for text in read_texts(piece, counts))
        else:
            rows = part.kind.read(read_rows(piece, part.kind, counts), file, counts)
        key = f"{file.name}:{piece.start}:" if piece.start else f"{file.name}:"
        address = file.address
        for number, row in enumerate(rows):
            yield row.document(file.split or split_of(f"{key}{number}", seed, config), address)


def list_pieces(config: DataConfig, size: int) -> list[Piece]:
    """Return the files of data.test_path, data.validation_path and data.path, in that order, large ones in pieces.

    Held-out files come first, so that of two copies of a text the training copy is the one that is dropped. A piece has
    about `size` bytes where the format can be split. Raises UserError for a path where nothing is.
    """
    files = list_files(config)
    if config.format == "auto" and all(strip_compression_suffix(file.name).lower().endswith(".json") for file in files):
        raise UserError(
            f"{files[0].address} may hold rows or be a text itself: say which with data.format=jsonl (one object a line) or data.format=text"
        )
    is_few = {split: sum(f.split == split for f in files) < FEW_FILES for split in {f.split for f in files}}
    pieces: list[Piece] = []
    for file in files:
        file_format = config.format if config.format != "auto" else format_of(file.name)
        if file_format == "text" and (column := _column_beside_text(config)):
            raise UserError(
                f"{file.address} is plain text and has no column '{column}': "
                "give labeled data as .jsonl, .parquet or .arrow (data.format says which)"
            )
        prose = strip_compression_suffix(file.name).lower().endswith((".txt", ".md"))
        by_paragraph = file_format == "text" and is_few[file.split] and prose
        splittable = file.size > size and not file.is_compressed
        points = split_points(file, file_format, by_paragraph, size) if splittable else []
        starts = [0, *points]
        share = file.size // len(starts)
        pieces += [
            Piece(file, file_format, start, stop, share, by_paragraph) for start, stop in zip(starts, [*points, None])
        ]
    return pieces


def check(config: DataConfig) -> None:
    """Raise UserError where the first file of a path is not of its format, or lacks a column; reads only its beginning."""
    first = {piece.file.split: piece for piece in reversed(list_pieces(config, 2**62))}
    kind = find_kind(config)
    for piece in first.values():
        if piece.format != "text":
            next(read_rows(piece, kind, Counter()), None)


def find_kind(config: DataConfig) -> DataKind:
    """Return the kind of data that the options ask for; the first rows tell where the options don't."""
    return kind_of(config, lambda: _first_rows(config))


def _first_rows(config: DataConfig) -> Iterator[dict[str, Any]]:
    reader = AnyColumns(matching_kinds(config)[0].columns)
    for piece in list_pieces(config, 2**62):
        if piece.format != "text":
            yield from read_rows(piece, reader, Counter())


def _column_beside_text(config: DataConfig) -> str | None:
    """Return a column that the data need and plain text cannot have."""
    columns = matching_kinds(config)[0].columns
    return next((column for column, option in columns.items() if option != "data.text_column"), None)

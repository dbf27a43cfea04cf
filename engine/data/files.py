"""Your own text: files, folders and globs, here or in object storage, as text, JSON lines, Parquet or Arrow, packed or not."""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from engine.config import DataConfig
from engine.data.corpus import Document, Part, Piece, label_name, no_label, split_of
from engine.data.images import caption_fields, pictures
from engine.data.inputs import File, bare, list_files
from engine.data.speech import utterances
from engine.errors import UserError, nearest

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
OTHER_PACKINGS = (".bz2", ".xz", ".zip", ".7z", ".rar", ".lz4", ".tar", ".tgz")
FEW_FILES = 20  # fewer text files than this are cut at paragraphs, since a share of so few cannot be held out
PARAGRAPHS = 4096  # characters after which the next blank line ends a document; at four times that, the next line does


def read(part: Part, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a part. Each row (or file, or run of paragraphs) goes to a split by a hash of its file's
    name, its number and the seed, unless its file was given for one.
    """
    config = part.config
    for piece in part.pieces:
        file = piece.file
        if piece.kind == "text":
            rows: Iterable[tuple[Any, ...]] = ((text,) for text in _texts(piece, counts))
        elif config.image_column:
            rows = pictures(_rows(piece, config, counts), config, file, counts)
        elif config.audio_column:
            rows = utterances(_rows(piece, config, counts), config, file, counts)
        else:
            rows = labelled(_rows(piece, config, counts), config, counts)
        key = f"{file.name}:{piece.start}:" if piece.start else f"{file.name}:"
        place = file.place
        for number, (text, *others) in enumerate(rows):
            yield Document(text, file.split or split_of(f"{key}{number}", seed, config), place, *others)


def pieces(config: DataConfig, size: int) -> list[Piece]:
    """Return the files of data.test_path, data.validation_path and data.path, in that order, the large ones in pieces.

    Held-out files come first, so that of two copies of a text the training copy is the one that is dropped. A piece has
    about `size` bytes where the format can be entered in the middle. Raises UserError for a path where nothing is.
    """
    given = list_files(config)
    if config.format == "auto" and all(bare(file.name).lower().endswith(".json") for file in given):
        raise UserError(
            f"{given[0].place} may hold rows or be a text itself: say which with data.format=jsonl (one object a line) or data.format=text"
        )
    few = {split: sum(f.split == split for f in given) < FEW_FILES for split in {f.split for f in given}}
    found: list[Piece] = []
    for file in given:
        kind = config.format if config.format != "auto" else _kind(file.name)
        if kind == "text" and (column := config.image_column or config.audio_column or config.label_column):
            raise UserError(
                f"{file.place} is plain text and has no column '{column}': "
                "give labelled data as .jsonl, .parquet or .arrow (data.format says which)"
            )
        cut = kind == "text" and few[file.split] and bare(file.name).lower().endswith((".txt", ".md"))
        ends = _ends(file, kind, cut, size) if file.size > size and not file.packed else []
        starts = [0, *ends]
        share = file.size // len(starts)
        found += [Piece(file, kind, a, b, share, cut) for a, b in zip(starts, [*ends, None])]
    return found


def check(config: DataConfig) -> None:
    """Raise UserError where the first file of a path cannot be read as what it is, or lacks a column; reads but its head."""
    first = {piece.file.split: piece for piece in reversed(pieces(config, 2**62))}
    for piece in first.values():
        if piece.kind != "text":
            next(_rows(piece, config, Counter()), None)


def _ends(file: File, kind: str, cut: bool, size: int) -> list[int]:
    """Return where to cut a large file: bytes of text and JSON lines, row groups of Parquet, record batches of Arrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "jsonl" or cut:
        return list(range(size, file.size, size))
    try:
        with file.open() as opened:
            if kind == "parquet":
                facts = pq.ParquetFile(opened).metadata
                weights = [facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)]
            elif kind == "arrow":
                count = pa.ipc.open_file(opened).num_record_batches
                weights = [file.size // max(count, 1)] * count
            else:
                return []
    except (
        pa.ArrowInvalid
    ):  # a stream of batches cannot be entered in the middle; what is damaged is told when it is read
        return []
    ends, held = [], 0
    for i, weight in enumerate(weights[:-1]):
        held += weight
        if held >= size:
            ends.append(i + 1)
            held = 0
    return ends


def _kind(name: str) -> str:
    return ENDINGS.get(PurePosixPath(bare(name)).suffix.lower(), "text")


def _texts(piece: Piece, counts: Counter[str]) -> Iterator[str]:
    """Yield a text file whole or, when it is one of few and plain prose, in runs of paragraphs."""
    if piece.file.name.lower().endswith(OTHER_PACKINGS):
        counts["packed, but not as .gz or .zst"] += 1
        return
    if not piece.cut:
        with piece.file.open() as opened:
            content = opened.read()
        if problem := _not_text([content]):
            counts[problem] += 1
            return
        text = content.decode("utf-8-sig")
        yield _plain_ends(text) if "\r" in text else text
        return
    with piece.file.open() as opened:
        problem = _not_text(_lines(opened, piece))
    if problem:
        counts[problem] += 1
        return
    with piece.file.open() as opened:
        lines = (_plain_ends(line.decode("utf-8-sig")) for line in _lines(opened, piece))
        yield from _paragraphs(lines, piece.start == 0)


def _lines(opened: IO[bytes], piece: Piece) -> Iterator[bytes]:
    """Yield the lines that begin in the piece."""
    if not piece.start and piece.stop is None:
        yield from opened
        return
    at = max(piece.start - 1, 0)
    opened.seek(at)
    if piece.start:
        at += len(opened.readline())  # the end of a line that began before, or just its line break
    while (piece.stop is None or at < piece.stop) and (line := opened.readline()):
        yield line
        at += len(line)


def _plain_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_text(lines: Iterable[bytes]) -> str | None:
    """Return why the bytes are no UTF-8 text, or None."""
    try:
        for line in lines:
            if b"\0" in line:
                return "not UTF-8" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "binary"
            line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def _paragraphs(lines: Iterable[str], first: bool) -> Iterator[str]:
    """Cut at the first blank line after PARAGRAPHS characters (or, in text without any, at a line end).

    The first piece of a file has a document, be it empty; one in which no line begins has none.
    """
    held: list[str] = []
    size, cuts = 0, 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= PARAGRAPHS and (not line.strip() or size >= 4 * PARAGRAPHS):
            yield "".join(held)
            held, size, cuts = [], 0, cuts + 1
    if held or (first and not cuts):
        yield "".join(held)


def _rows(piece: Piece, config: DataConfig, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with the columns that are needed."""
    return _json_rows(piece, columns(config), counts) if piece.kind == "jsonl" else _table_rows(piece, config)


def columns(config: DataConfig) -> dict[str, str]:
    """Return the columns that are read, and for each the option that names it."""
    found = {config.label_column: "data.label_column"} if config.label_column else {}
    if config.audio_column:
        return {config.text_column: "data.text_column", config.audio_column: "data.audio_column"}
    if not config.image_column:
        return {config.text_column: "data.text_column"} | found
    of_caption = {name: "data.caption" for name in caption_fields(config.caption) if name != "label"}
    return {config.image_column: "data.image_column"} | of_caption | found


def labelled(
    rows: Iterable[dict[str, Any]], config: DataConfig, counts: Counter[str]
) -> Iterator[tuple[str, str | None]]:
    """Yield (text, label) of each row that has them; count those that don't."""
    for row in rows:
        text, label = row.get(config.text_column), row.get(config.label_column) if config.label_column else None
        if not isinstance(text, str) or not _encodable(text):
            counts["without text"] += 1
        elif config.label_column and no_label(label):
            counts["without a label"] += 1
        else:
            yield text, label_name(label)


def _encodable(text: str) -> bool:
    """Say whether the text is Unicode that UTF-8 can hold (a JSON escape may spell half a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(piece: Piece, wanted: dict[str, str], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    good, first_bad = False, 0
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
                first_bad = first_bad or number
                continue
            if not good:
                need_columns(piece.file.place, wanted, row)
                good = True
            yield row
    if first_bad and not good and not piece.start and piece.stop is None:
        raise UserError(
            f"no line of {piece.file.place} is a JSON object (the first bad one is line {first_bad}): "
            "write one object a line, in UTF-8 (jq -c '.[]' does it to an array), or set data.format=text"
        )


def _table_rows(piece: Piece, config: DataConfig) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with piece.file.open() as opened:
        if piece.file.packed:
            opened = io.BytesIO(opened.read())  # a table's end is read first
        try:
            if piece.kind == "parquet":
                table = pq.ParquetFile(opened)
                _need_fields(piece.file.place, config, table.schema_arrow)
                groups = range(table.num_row_groups)[piece.start : piece.stop]
                batches: Iterable[pa.RecordBatch] = table.iter_batches(4096, list(groups), list(columns(config)))
            else:
                batches = _arrow_batches(piece, opened, config)
            for batch in batches:
                yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{piece.file.place} is no {piece.kind} file ({error}): mend it or set data.format"
            ) from error


def _arrow_batches(piece: Piece, opened: IO[bytes], config: DataConfig) -> Iterator[Any]:
    """Read both of Arrow's layouts: the IPC file, and the stream that `datasets` writes."""
    import pyarrow as pa

    try:
        indexed = pa.ipc.open_file(opened)
        there = range(indexed.num_record_batches)[piece.start : piece.stop]
        batches: Iterable[pa.RecordBatch] = (indexed.get_batch(i) for i in there)
        schema = indexed.schema
    except pa.ArrowInvalid:
        opened.seek(0)
        stream = pa.ipc.open_stream(opened)
        batches, schema = stream, stream.schema
    _need_fields(piece.file.place, config, schema)
    yield from (batch.select(list(columns(config))) for batch in batches)


def _need_fields(place: str, config: DataConfig, schema: Any) -> None:
    """Raise UserError for a column that isn't there, that is there twice, or that should have text and cannot."""
    import pyarrow.types as kinds

    need_columns(place, columns(config), schema.names)
    for name, key in columns(config).items():
        if schema.names.count(name) > 1:
            raise UserError(f"{place} has {schema.names.count(name)} columns '{name}' ({key}): rename all but one")
    if config.image_column or config.audio_column:
        return
    kind = schema.field(config.text_column).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind) or kinds.is_null(kind)):
        others = [field.name for field in schema if kinds.is_string(field.type) or kinds.is_large_string(field.type)]
        raise UserError(
            f"column '{config.text_column}' of {place} holds {kind}, not text: "
            + (f"name another with data.text_column ({', '.join(others)})" if others else "write it as strings")
        )


def need_columns(place: str, wanted: dict[str, str], there: Iterable[str]) -> None:
    """Raise UserError for a column that isn't there, naming the option that asks for it."""
    names = list(there)
    for column, key in wanted.items():
        if column not in names:
            hint = nearest(column, names) or f": set {key} to one of them"
            raise UserError(f"{place} has no column '{column}' ({key}), only {', '.join(names) or 'none'}{hint}")

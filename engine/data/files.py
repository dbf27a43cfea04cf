"""Your own text: files, folders and globs, here or in object storage, as text, JSON lines, Parquet or Arrow."""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from engine.config import DataConfig
from engine.data.corpus import Document, split_of
from engine.errors import UserError, nearest

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
FEW_FILES = 20  # fewer text files than this are cut at paragraphs, since a share of so few cannot be held out
PARAGRAPHS = 4096  # characters after which the next blank line ends a document; at four times that, the next line does


@dataclass(frozen=True)
class File:
    """One input file: where it is, its name below the path given, the split it was given for (None: by hash), what dates it."""

    path: str
    name: str
    split: str | None
    size: int
    stamp: str
    filesystem: Any

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open it for reading bytes, unpacked if it ends in .gz. Raises UserError where it cannot be read."""
        try:
            with self.filesystem.open(self.path, "rb") as raw:
                yield gzip.GzipFile(fileobj=raw) if self.path.endswith(".gz") else raw  # type: ignore[misc]
        except (PermissionError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {self.path} ({error}): mend it or leave it out of the path") from error

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of its bytes as they are stored."""
        with self.filesystem.open(self.path, "rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()


def read(config: DataConfig, seed: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of data.test_path, data.validation_path and data.path, in that order.

    Held-out files come first, so that of two copies of a text the training copy is the one that is dropped. Without
    such paths each row (or file, or run of paragraphs) goes to a split by a hash of its file's name, its number and
    the seed.
    """
    given = list_files(config)
    config = dataclasses.replace(  # what has a path of its own is not taken from data.path as well
        config,
        validation_fraction=0.0 if config.validation_path else config.validation_fraction,
        test_fraction=0.0 if config.test_path else config.test_fraction,
    )
    few = {split: sum(f.split == split for f in given) < FEW_FILES for split in {f.split for f in given}}
    for file in given:
        kind = config.format if config.format != "auto" else _kind(file.name)
        if kind == "text":
            if config.label_column:
                raise UserError(
                    f"{file.path} is plain text and has no column '{config.label_column}': "
                    "give labelled data as .jsonl, .parquet or .arrow (data.format says which)"
                )
            rows: Iterable[tuple[str, str | None]] = ((text, None) for text in _texts(file, few[file.split], counts))
        else:
            rows = _labelled_rows(file, kind, config, counts)
        for number, (text, label) in enumerate(rows):
            split = file.split or split_of(f"{file.name}:{number}", seed, config)
            yield Document(text, split, file.path, label)


def list_files(config: DataConfig) -> list[File]:
    """Return the input files, sorted within each path. Raises UserError for a path where nothing is."""
    if not config.path:
        raise UserError("data.path is not set: say where the training text is with data.path=FILE_FOLDER_OR_GLOB")
    return [
        *expand("data.test_path", config.test_path, "test"),
        *expand("data.validation_path", config.validation_path, "validation"),
        *expand("data.path", config.path, None),
    ]


def expand(key: str, value: str | None, split: str | None) -> list[File]:
    """List the files of one path: a file, a folder, a glob, or several of these with commas between them."""
    from fsspec.core import url_to_fs

    if not value:
        return []
    try:
        filesystem, place = url_to_fs(value)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}={value} cannot be opened ({error}): install what reads it, or copy it here") from error
    if "," in value and not filesystem.exists(place):
        return [file for item in value.split(",") if item.strip() for file in expand(key, item.strip(), split)]
    if filesystem.isfile(place):
        found, start = {place: filesystem.info(place)}, str(PurePosixPath(place).parent)
    elif filesystem.isdir(place):
        found, start = filesystem.find(place, detail=True), place
    elif set(value) & set("*?["):
        found = {path: info for path, info in filesystem.glob(place, detail=True).items() if info["type"] == "file"}
        start = place[: min(i for i, letter in enumerate(place) if letter in "*?[")].rpartition("/")[0]
        if not found:
            raise UserError(f"{key}='{value}' matches no file: check the pattern ('**' also goes into folders)")
    else:
        parent = str(PurePosixPath(place).parent)
        near = (
            [path.rsplit("/", 1)[-1] for path in filesystem.ls(parent, detail=False)]
            if filesystem.isdir(parent)
            else []
        )
        hint = nearest(PurePosixPath(place).name, near) or ": give a file, a folder or a glob"
        raise UserError(f"{key}={value} is not there{hint}")
    files = [
        File(path, path.removeprefix(start).lstrip("/"), split, info.get("size") or 0, _stamp(info), filesystem)
        for path, info in sorted(found.items())
    ]
    files = [f for f in files if not any(part.startswith((".", "__pycache__")) for part in f.name.split("/"))]
    if not files:
        raise UserError(f"{key}={value} is a folder with no files in it: put text there or give another path")
    return files


def _stamp(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in ("mtime", "ETag", "etag", "md5Hash", "LastModified") if info.get(key)), ""))


def _kind(name: str) -> str:
    return ENDINGS.get(PurePosixPath(name.removesuffix(".gz")).suffix.lower(), "text")


def _texts(file: File, cut: bool, counts: Counter[str]) -> Iterator[str]:
    """Yield a text file whole or, when it is one of few and plain prose, in runs of paragraphs."""
    with file.open() as opened:
        problem = _not_text(opened)
    if problem:
        counts[problem] += 1
        return
    with file.open() as opened:
        lines = io.TextIOWrapper(opened, encoding="utf-8-sig")
        yield from _paragraphs(lines) if cut and file.name.endswith((".txt", ".txt.gz", ".md")) else [lines.read()]


def _not_text(opened: IO[bytes]) -> str | None:
    """Return why the bytes are no UTF-8 text, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := opened.read(2**20):
            if b"\0" in block:
                return "binary"
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Cut at the first blank line after PARAGRAPHS characters (or, in text without any, at a line end)."""
    held: list[str] = []
    size, cuts = 0, 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= PARAGRAPHS and (not line.strip() or size >= 4 * PARAGRAPHS):
            yield "".join(held)
            held, size, cuts = [], 0, cuts + 1
    if held or not cuts:
        yield "".join(held)


def _labelled_rows(file: File, kind: str, config: DataConfig, counts: Counter[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (text, label) of each row that has them; count those that don't."""
    wanted = [config.text_column, *([config.label_column] if config.label_column else [])]
    rows = _json_rows(file, wanted, counts) if kind == "jsonl" else _table_rows(file, kind, wanted)
    for row in rows:
        text, label = row.get(config.text_column), row.get(config.label_column) if config.label_column else None
        if not isinstance(text, str) or not _encodable(text):
            counts["without text"] += 1
        elif config.label_column and (label is None or label == "" or isinstance(label, (list, dict))):
            counts["without a label"] += 1
        else:
            yield text, None if label is None else f"{label:g}" if isinstance(label, float) else str(label)


def _encodable(text: str) -> bool:
    """Say whether the text is Unicode that UTF-8 can hold (a JSON escape may spell half a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(file: File, wanted: list[str], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    good, first_bad = False, 0
    with file.open() as opened:
        for number, line in enumerate(opened, start=1):
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
                _need_columns(file, wanted, row)
                good = True
            yield row
    if first_bad and not good:
        raise UserError(
            f"no line of {file.path} is a JSON object (the first bad one is line {first_bad}): "
            "write one object a line, or set data.format=text"
        )


def _table_rows(file: File, kind: str, wanted: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open() as opened:
        try:
            if kind == "parquet":
                table = pq.ParquetFile(opened)
                _need_columns(file, wanted, table.schema_arrow.names)
                batches: Iterable[pa.RecordBatch] = table.iter_batches(batch_size=4096, columns=wanted)
            else:
                batches = _arrow_batches(file, opened, wanted)
            for batch in batches:
                yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise UserError(f"{file.path} is no {kind} file ({error}): mend it or set data.format") from error


def _arrow_batches(file: File, opened: IO[bytes], wanted: list[str]) -> Iterator[Any]:
    """Read both of Arrow's layouts: the IPC file, and the stream that `datasets` writes."""
    import pyarrow as pa

    try:
        indexed = pa.ipc.open_file(opened)
        batches: Iterable[pa.RecordBatch] = (indexed.get_batch(i) for i in range(indexed.num_record_batches))
        names = indexed.schema.names
    except pa.ArrowInvalid:
        opened.seek(0)
        stream = pa.ipc.open_stream(opened)
        batches, names = stream, stream.schema.names
    _need_columns(file, wanted, names)
    yield from (batch.select(wanted) for batch in batches)


def _need_columns(file: File, wanted: list[str], there: Iterable[str]) -> None:
    names = list(there)
    for column, key in zip(wanted, ("data.text_column", "data.label_column")):
        if column not in names:
            hint = nearest(column, names) or f": set {key} to one of them"
            raise UserError(f"{file.path} has no column '{column}' ({key}), only {', '.join(names) or 'none'}{hint}")

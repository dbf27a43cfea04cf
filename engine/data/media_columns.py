"""Columns that hold files, of images or sounds: their bytes, and the rows of a table decoded by threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

from engine.data.filesystems import is_remote, remote_errors
from engine.data.input_files import InputFile

T = TypeVar("T")

BATCH_ROWS = 256  # decoded together
BYTES_PER_TOKEN = 16  # of pixels or sound, which fill a shard as much as one token


def decode_rows(
    rows: Iterable[dict[str, Any]], decode: Callable[[dict[str, Any]], T | str], counts: Counter[str]
) -> Iterator[T]:
    """Yield what `decode` returns of each row; where that is a reason, the row is left out and counted."""
    remaining = iter(rows)
    with ThreadPoolExecutor() as pool:  # the libraries that decode release the GIL
        while batch := list(islice(remaining, BATCH_ROWS)):
            for result in pool.map(decode, batch):
                if isinstance(result, str):
                    counts[result] += 1
                else:
                    yield result


def read_bytes(value: Any, file: InputFile) -> bytes | None:
    """Return the bytes that a column holds, or those of the file that it names by a path relative to the table's folder."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    if isinstance(content, bytes):
        return content
    if not isinstance(path, str) or not path:
        return None
    address = str(PurePosixPath(file.path).parent / path)
    with remote_errors(address, file.filesystem):
        try:
            loaded: bytes = file.filesystem.cat_file(address)
        except OSError as error:
            if is_remote(file.filesystem) and not isinstance(error, FileNotFoundError):
                raise  # the file may exist
            return None
    return loaded

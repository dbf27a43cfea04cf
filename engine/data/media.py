"""Columns that hold files, of images or sounds: the bytes of one, and the rows of a table decoded by threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.stores import is_far, store_errors

if TYPE_CHECKING:
    from engine.data.inputs import File

CHUNK = 256  # rows that are decoded together
Decoded = tuple[str, str | None, np.ndarray]  # text, label, and the pixels or the samples


def decoded(
    rows: Iterable[dict[str, Any]], read: Callable[[dict[str, Any]], Decoded | str], counts: Counter[str]
) -> Iterator[Decoded]:
    """Yield what `read` gives of each row; where that is a reason, the row is left out and counted."""
    remaining = iter(rows)
    with ThreadPoolExecutor() as pool:  # the libraries that decode don't hold the interpreter
        while chunk := list(islice(remaining, CHUNK)):
            for found in pool.map(read, chunk):
                if isinstance(found, str):
                    counts[found] += 1
                else:
                    yield found


def content_of(value: Any, file: File) -> bytes | None:
    """Return the bytes that a column has, or those of the file that it names, beside the table's own."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    if isinstance(content, bytes):
        return content
    if not isinstance(path, str) or not path:
        return None
    place = str(PurePosixPath(file.path).parent / path)
    with store_errors(place, file.filesystem):
        try:
            found: bytes = file.filesystem.cat_file(place)
        except OSError as error:
            if is_far(file.filesystem) and not isinstance(error, FileNotFoundError):
                raise  # it may well be there
            return None
    return found

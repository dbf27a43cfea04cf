"""Documents and how they are cut up: splits, labels, pieces of input files, and the parts that one process works on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import DataConfig

if TYPE_CHECKING:
    from engine.data.input_files import InputFile
    from engine.data.kinds import DataKind

SPLITS = ("train", "validation", "test")
Span = tuple[int, int, str]  # first character, character after the last, label


@dataclass(frozen=True)
class Document:
    """One row of a corpus: its text, the split that it belongs to, its file, and what its kind of data adds."""

    text: str  # of an image: its caption, or nothing; of a sound: its transcript
    split: str
    source: str  # the input file, as `corpus.listed_name` names it
    label: str | None = None
    signal: np.ndarray | None = None  # of an image: uint8 [S, S, 3]; of a sound: int16 [samples]
    spans: tuple[Span, ...] = ()  # labeled parts of the text, in its order


@dataclass(frozen=True)
class Piece:
    """An input file or a range of it, in the units of its format (see `file_formats.split_points`)."""

    file: InputFile
    format: str  # text, jsonl, parquet, arrow; or the name of another reader
    start: int
    stop: int | None  # None: to the end
    size: int  # bytes, about
    by_paragraph: bool = False  # text is split into runs of paragraphs


@dataclass(frozen=True)
class Part:
    """The unit of work: as much of one source as a process reads and tokenizes at once; the same for any number of processes."""

    number: int
    source: str
    config: DataConfig  # of this source
    pieces: tuple[Piece, ...]
    kind: DataKind

    @property
    def size(self) -> int:
        """Its size in bytes, about."""
        return sum(piece.size for piece in self.pieces)


def hash_fraction(*parts: object) -> float:
    """Return a uniform number in [0, 1) that depends on `parts` alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def is_missing(value: Any) -> bool:
    """Return whether a column's value is no usable label: null, NaN, empty, or a list or object."""
    return value is None or value in ("", b"") or isinstance(value, (list, dict)) or value != value  # NaN != NaN


def label_name(value: Any) -> str | None:
    """Return a label as text; it may be a number or bytes in the data."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def is_encodable(text: str) -> bool:
    """Return whether UTF-8 can hold the text (a JSON escape may spell half a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_of(key: str, seed: int, config: DataConfig) -> str:
    """Return the split of a file or row: a pure function of its key, the seed and the two held-out fractions.

    The test split takes the bottom of the hash's range and validation the top, so that changing one fraction moves
    nothing between the two.
    """
    fraction = hash_fraction("split", seed, key)
    if fraction < config.test_fraction:
        return "test"
    return "validation" if fraction >= 1 - config.validation_fraction else "train"


def evenly_spaced(size: int, count: int) -> list[int]:
    """Return up to `count` indices below `size`, evenly spaced."""
    return list(range(size)) if count >= size else [int(i) for i in np.arange(count) * size // count]


def explicit_split(config: DataConfig, split: str) -> str | None:
    """Return the path (of files) or split name (of a Hugging Face dataset) given for a held-out split, if any."""
    value: str | None = getattr(config, f"{split}_split" if config.source == "huggingface" else f"{split}_path")
    return value

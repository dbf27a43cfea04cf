"""Raw documents, each with its split: the corpus as parts that are read apart, and the choice of what is kept of all."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import DataConfig, source_configs

if TYPE_CHECKING:
    from engine.data.inputs import File

SPLITS = ("train", "validation", "test")
PART_BYTES = 4  # of text for a token of data.shard_tokens


@dataclass(frozen=True)
class Document:
    """One text, the split it belongs to, the file it came from and, for labelled data, its label; or an image or a sound."""

    text: str  # of an image: its caption, or nothing; of a sound: its words
    split: str
    source: str
    label: str | None = None
    signal: np.ndarray | None = None  # of an image: uint8 [S, S, 3]; of a sound: int16 [samples]


@dataclass(frozen=True)
class Piece:
    """An input file or a stretch of it, in the units of its format (see `files._ends`)."""

    file: File
    kind: str  # text, jsonl, parquet, arrow; or a reader's own
    start: int
    stop: int | None  # None: to the end
    size: int  # bytes, about
    cut: bool = False  # text is cut at paragraphs


@dataclass(frozen=True)
class Part:
    """So much of one source as a process reads and tokenizes at a time; the same for any number of processes."""

    number: int
    source: str
    config: DataConfig  # the source's own
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Its bytes, about."""
        return sum(piece.size for piece in self.pieces)


def parts(config: DataConfig) -> list[Part]:
    """Cut the corpus into parts, in the order of their documents: those of held-out files come first, then by source.

    Raises UserError for a path where nothing is.
    """
    size = config.shard_tokens * PART_BYTES
    held: list[tuple[int, str, DataConfig, list[Piece]]] = []
    for name, given in source_configs(config).items():
        own = _without_given_splits(given)
        room = 0
        for piece in _reader(own.source).pieces(given, size):
            rank = ("test", "validation", None).index(piece.file.split)
            if room <= 0 or held[-1][:2] != (rank, name):
                held.append((rank, name, own, []))
                room = size
            held[-1][3].append(piece)
            room -= piece.size
    held.sort(key=lambda item: item[0])  # stable
    return [Part(i, name, own, tuple(pieces)) for i, (_, name, own, pieces) in enumerate(held)]


def inputs(config: DataConfig) -> list[tuple[str, str, File]]:
    """Return (source, path, file) of each input file, without a look into it. Raises UserError for a path where nothing is."""
    return [
        (name, listed_as(own, piece.file), piece.file)
        for name, own in source_configs(config).items()
        for piece in _reader(own.source).pieces(own, 2**62)
    ]


def listed_as(config: DataConfig, file: File) -> str:
    """Return the name under which a file is listed, which its documents give as their source."""
    return file.name if config.source.startswith("python_") else file.place


def read(part: Part, seed: int, skipped: Counter[str], masked: Counter[str]) -> Iterator[Document]:
    """Yield a part's documents, masked, without those that are empty or filtered out; count what is masked and left out.

    The same (part, seed, files) always gives the same documents. Raises UserError for a column or format that isn't there.
    """
    from engine.data.filters import reason_against
    from engine.data.masking import masking

    mask, against = masking(part.config.mask), reason_against(part.config)
    for document in _reader(part.config.source).read(part, seed, skipped):
        if mask:
            document = dataclasses.replace(document, text=mask(document.text, masked))
        if not document.text.strip() and document.signal is None:
            skipped["empty"] += 1
        elif against and (reason := against(document.text)):
            skipped[reason] += 1
        else:
            yield document


def check_input(config: DataConfig) -> None:
    """Raise UserError, before anything is begun, for a path, column, filter or package that isn't there."""
    from engine.data.filters import reason_against

    for given in source_configs(config).values():
        reason_against(given)
        _reader(given.source).check(given)


def hash_fraction(*parts: object) -> float:
    """Return a uniform number in [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def no_label(value: Any) -> bool:
    """Say whether a column's value is no label."""
    return value is None or value in ("", b"") or isinstance(value, (list, dict)) or value != value  # a float's NaN


def label_name(value: Any) -> str | None:
    """Name a label that may be a number."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def split_of(key: str, seed: int, config: DataConfig) -> str:
    """Return the split of a file or row: a pure function of its key, the seed and the two fractions.

    Tests are taken from the bottom of the hash's range and validation from its top, so that a change of one fraction
    moves nothing between the two.
    """
    fraction = hash_fraction("split", seed, key)
    if fraction < config.test_fraction:
        return "test"
    return "validation" if fraction >= 1 - config.validation_fraction else "train"


def evenly(size: int, wanted: int) -> list[int]:
    """Return up to `wanted` indices below `size`, evenly spaced."""
    return list(range(size)) if wanted >= size else [int(i) for i in np.arange(wanted) * size // wanted]


def given_split(config: DataConfig, split: str) -> str | None:
    """Return the path (of files) or split (of a Hugging Face dataset) that holds a held-out split, if one is named."""
    found: str | None = getattr(config, f"{split}_split" if config.source == "huggingface" else f"{split}_path")
    return found


def _without_given_splits(config: DataConfig) -> DataConfig:
    """Take no share of the training examples for a split that has examples of its own."""
    return dataclasses.replace(
        config,
        validation_fraction=0.0 if given_split(config, "validation") else config.validation_fraction,
        test_fraction=0.0 if given_split(config, "test") else config.test_fraction,
    )


def _reader(source: str) -> ModuleType:
    """Return the module that reads a source: it has `pieces`, `read` and `check`."""
    from engine.data import files, hub, stdlib

    return {"files": files, "huggingface": hub}.get(source, stdlib)

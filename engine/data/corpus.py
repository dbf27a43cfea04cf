"""The corpus: its input files, the parts that it is divided into, and the documents of one part, masked and filtered."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

from engine.config import DataConfig, source_configs
from engine.data import files, huggingface, python_stdlib
from engine.data.document import Document, Part, Piece, explicit_split
from engine.data.filters import make_filter
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind
from engine.data.pii_masking import make_masker

BYTES_PER_TOKEN = 4  # of text, about


def list_parts(config: DataConfig) -> list[Part]:
    """Divide the corpus into parts, in the order of their documents: those of held-out files come first, then by source.

    Raises UserError for a path where nothing is.
    """
    size = config.shard_tokens * BYTES_PER_TOKEN
    groups: list[tuple[int, str, DataConfig, DataKind, list[Piece]]] = []
    for name, given in source_configs(config).items():
        reader = _reader(given.source)
        own, kind = _without_explicit_splits(given), reader.find_kind(given)
        kind = dataclasses.replace(kind, config=own)
        remaining = 0
        for piece in reader.list_pieces(given, size):
            rank = ("test", "validation", None).index(piece.file.split)
            if remaining <= 0 or groups[-1][:2] != (rank, name):
                groups.append((rank, name, own, kind, []))
                remaining = size
            groups[-1][-1].append(piece)
            remaining -= piece.size
    groups.sort(key=lambda group: group[0])  # stable
    return [Part(i, name, own, tuple(pieces), kind) for i, (_, name, own, kind, pieces) in enumerate(groups)]


def list_inputs(config: DataConfig) -> list[tuple[str, str, InputFile]]:
    """Return (source, listed name, file) of each input file, without opening it. Raises UserError for a path where nothing is."""
    return [
        (name, listed_name(own, piece.file), piece.file)
        for name, own in source_configs(config).items()
        for piece in _reader(own.source).list_pieces(own, 2**62)
    ]


def listed_name(config: DataConfig, file: InputFile) -> str:
    """Return the name under which a file is listed, which its documents give as their source."""
    return file.name if config.source.startswith("python_") else file.address


def read_part(part: Part, seed: int, skipped: Counter[str], masked: Counter[str]) -> Iterator[Document]:
    """Yield a part's documents, masked, without those that are empty or filtered out; count what is masked and skipped.

    The same (part, seed, files) always gives the same documents. Raises UserError for a column or format that isn't there.
    """
    mask, skip_reason = make_masker(part.config.mask), make_filter(part.config)
    for document in _reader(part.config.source).read(part, seed, skipped):
        if mask:
            document = dataclasses.replace(document, text=mask(document.text, masked))
        if not document.text.strip() and document.signal is None:
            skipped["empty"] += 1
        elif skip_reason and (reason := skip_reason(document.text)):
            skipped[reason] += 1
        else:
            yield document


def check_input(config: DataConfig) -> None:
    """Raise UserError, before any work is started, for a path, column, filter or package that isn't there."""
    for own in source_configs(config).values():
        make_filter(own)
        _reader(own.source).check(own)


def _without_explicit_splits(config: DataConfig) -> DataConfig:
    """Take no share of the training examples for a split that has files of its own."""
    return dataclasses.replace(
        config,
        validation_fraction=0.0 if explicit_split(config, "validation") else config.validation_fraction,
        test_fraction=0.0 if explicit_split(config, "test") else config.test_fraction,
    )


def _reader(source: str) -> ModuleType:
    """Return the module that reads a source: it has `list_pieces`, `read`, `check` and `find_kind`."""
    return {"files": files, "huggingface": huggingface}.get(source, python_stdlib)

"""Kinds of prepared data, one file each: which options ask for it, what it reads of a row, what a shard stores of it.

A new kind is one file here with one subclass of `DataKind`; it is found by listing the folder. An objective names the
kind that it reads (`Objective.data_kind`) and takes its samples. Nothing else in the project lists the kinds.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from engine.config import Config, DataConfig
from engine.data.columns import Column
from engine.data.document import Document, Span
from engine.data.input_files import InputFile
from engine.data.tokenizer import SpecialTokens, fast_encoder
from engine.errors import UserError, did_you_mean

PEEKED_ROWS = 1000  # rows of the first file that are read to tell kinds apart whose options are the same


class Row(NamedTuple):
    """What a kind reads of one input row; the fields are those of `Document`."""

    text: str
    label: str | None = None
    signal: np.ndarray | None = None
    spans: tuple[Span, ...] = ()

    def document(self, split: str, source: str) -> Document:
        """Return the row as a document of a split and an input file."""
        return Document(self.text, split, source, self.label, self.signal, self.spans)


class EncodedRows(NamedTuple):
    """Documents as a shard stores them: all tokens end to end, each row's number of tokens, and the other columns."""

    tokens: np.ndarray
    lengths: np.ndarray
    columns: Mapping[str, Sequence[Any]] = {}


@dataclass(frozen=True)
class DataKind(ABC):
    """One kind of data, with the options of one source."""

    config: DataConfig

    name: ClassVar[str]  # as manifests and objectives write it
    description: ClassVar[str]  # completes "the data are ..."
    hint: ClassVar[str]  # how to ask for it
    has_text: ClassVar[bool] = True  # whether there are tokens, and so a tokenizer
    has_preprocessor: ClassVar[bool] = False  # whether an image processor or a feature extractor makes arrays of it
    has_sliceable_rows: ClassVar[bool] = False  # a row of a prepared split is one input row, known by its text
    uses_tokenizer_template: ClassVar[bool] = True  # rows get the tokenizer's own special tokens; else one end token

    @classmethod
    @abstractmethod
    def matches(cls, config: DataConfig) -> bool:
        """Return whether the options ask for this kind."""

    def matches_row(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row can be of this kind. Asked only where the options of two kinds are the same."""
        return True

    @property
    def has_labels(self) -> bool:
        """Whether documents have labels, whose names the manifest lists."""
        return False

    @property
    @abstractmethod
    def columns(self) -> dict[str, str]:
        """The columns that are read of a table, and for each the option that names it."""

    @property
    def stored_columns(self) -> tuple[Column, ...]:
        """The columns of a shard beside the tokens."""
        return ()

    def check(self) -> None:  # noqa: B027 - most kinds have nothing to check
        """Raise UserError for options that this kind cannot be prepared with."""

    def check_schema(self, address: str, schema: Any) -> None:  # noqa: B027 - most kinds take any type
        """Raise UserError for a table (its Arrow schema) whose columns are of unusable types."""

    @abstractmethod
    def read(self, rows: Iterable[dict[str, Any]], file: InputFile, counts: Counter[str]) -> Iterator[Row]:
        """Yield what is kept of a file's rows; count the rows left out, by reason."""

    def labels_of(self, document: Document) -> Iterable[str]:
        """Return the names of the labels that a document has."""
        return () if document.label is None else (document.label,)

    def make_preprocessor(self, config: Config, start: Path | None) -> Any:
        """Return the image processor or feature extractor of the data, if any; `start` is the bundle to start from."""
        return None

    def load_preprocessor(self, folder: str) -> Any:
        """Return that preprocessor from a folder. A kind that makes one has this method, too."""
        raise TypeError(f"data of the kind {self.name} have no preprocessor")

    def manifest_fields(self, processor: Path) -> dict[str, Any]:
        """Return the manifest's fields that only this kind has; `processor` is the prepared folder's processor."""
        return {}

    def finish_tokenizer(self, folder: Path, trained: bool) -> None:  # noqa: B027 - text needs nothing
        """Adapt the tokenizer in a folder to this kind; `trained`: it was trained on this data, not given."""

    @classmethod
    def make_encoder(
        cls, folder: Path, probe: Iterable[str] = (), threads: int | None = None
    ) -> Callable[[list[str]], Any]:
        """Return the function of texts that `encode` is given; `probe`: texts on which a fast path is checked."""
        return fast_encoder(folder, probe, threads)

    def encode(
        self,
        documents: Sequence[Document],
        encoder: Callable[[list[str]], Any],
        frame: Frame,
        label_ids: Mapping[str, int],
    ) -> EncodedRows:
        """Tokenize documents of one split and return what a shard stores of them."""
        tokens, lengths = frame.concatenate(encoder([document.text for document in documents]))
        return EncodedRows(tokens, lengths, self.values(documents, label_ids))

    def values(self, documents: Sequence[Document], label_ids: Mapping[str, int]) -> dict[str, Sequence[Any]]:
        """Return the values of the stored columns, by name."""
        return {}


@dataclass(frozen=True)
class Frame:
    """The special tokens around each row's tokens."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, special: SpecialTokens, kind: DataKind) -> Frame:
        """Return what the tokenizer puts around a sequence, or one end token after it, as the kind asks."""
        if kind.uses_tokenizer_template:
            return cls(tuple(special.opening), tuple(special.closing))
        return cls((), (special.eos_id,))

    def concatenate(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Frame rows of tokens and lay them end to end: returns the tokens and each row's length."""
        before, after = np.array(self.before, np.uint32), np.array(self.after, np.uint32)
        lengths = np.array([len(row) for row in rows], np.int64) + len(before) + len(after)
        if not len(before):
            return np.concatenate([piece for row in rows for piece in (row, after)]), lengths
        return np.concatenate([piece for row in rows for piece in (before, row, after)]), lengths


@functools.cache
def kind_classes() -> dict[str, type[DataKind]]:
    """Return every kind by its name: the subclasses of `DataKind` that the files of this folder define."""
    classes: dict[str, type[DataKind]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        classes |= {
            value.name: value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, DataKind) and value.__module__ == module.__name__
        }
    return dict(sorted(classes.items()))


def kind_class(name: str) -> type[DataKind]:
    """Return the kind of this name. Raises UserError where there is none."""
    classes = kind_classes()
    if name not in classes:
        raise UserError(
            f"'{name}' is not one of the kinds of data ({', '.join(classes)}){did_you_mean(name, list(classes))}"
        )
    return classes[name]


def matching_kinds(config: DataConfig) -> list[DataKind]:
    """Return the kinds that the options may ask for: one, or several that only the rows tell apart."""
    return [kind(config) for kind in kind_classes().values() if kind.matches(config)]


def kind_of(config: DataConfig, first_rows: Callable[[], Iterable[Mapping[str, Any]]]) -> DataKind:
    """Return the kind of one source; `first_rows` reads its first rows, where the options alone don't tell.

    Raises UserError for options that the kind cannot be prepared with.
    """
    kinds = matching_kinds(config)
    if len(kinds) > 1:
        for row in islice(first_rows(), PEEKED_ROWS):
            if len(fitting := [kind for kind in kinds if kind.matches_row(row)]) == 1:
                kinds = fitting
                break
    kinds[0].check()
    return kinds[0]

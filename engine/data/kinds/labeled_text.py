"""Texts with one label each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import DataConfig
from engine.data.columns import Column
from engine.data.document import Document, is_encodable, is_missing, label_name
from engine.data.file_formats import check_text_column
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, Row
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.shards import Split


@dataclass(frozen=True)
class LabeledText(DataKind):
    """A text and the name of its class. Samples: `LabeledRows`."""

    name = "labelled"
    description = "texts with labels"
    hint = "say which column holds the labels with data.label_column=..."
    has_sliceable_rows = True

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Match where a label is named, and neither image nor sound."""
        if config.image_column or config.audio_column:
            return False
        return config.label_column is not None or config.source == "python_functions"

    def matches_row(self, row: Mapping[str, Any]) -> bool:
        """Match a label that is no list."""
        return not isinstance(row.get(self.config.label_column or ""), list)

    @property
    def has_labels(self) -> bool:
        """Each text has one."""
        return True

    @property
    def columns(self) -> dict[str, str]:
        """The text and its label."""
        labels = {self.config.label_column: "data.label_column"} if self.config.label_column else {}
        return {self.config.text_column: "data.text_column"} | labels

    @property
    def stored_columns(self) -> tuple[Column, ...]:
        """The label of each row, an index of the manifest's labels."""
        return (Column("label", "int32", "scalar"),)

    def check_schema(self, address: str, schema: Any) -> None:
        """Raise UserError where the text's column holds no text."""
        check_text_column(address, self.config.text_column, schema)

    def read(self, rows: Iterable[dict[str, Any]], file: InputFile, counts: Counter[str]) -> Iterator[Row]:
        """Yield the text and label of each row that has both."""
        for row in rows:
            text, label = row.get(self.config.text_column), row.get(self.config.label_column or "")
            if not isinstance(text, str) or not is_encodable(text):
                counts["without text"] += 1
            elif is_missing(label):
                counts["without a label"] += 1
            else:
                yield Row(text, label_name(label))

    def values(self, documents: Sequence[Document], label_ids: Mapping[str, int]) -> dict[str, Sequence[Any]]:
        """Return the label of each document."""
        return {"label": [label_ids[document.label or ""] for document in documents]}


class LabeledRows:
    """The documents of a split with their labels.

    Sample i is {"tokens": int64 [at most max_length], "label": int}. A longer one is truncated, but keeps its closing special
    tokens (BERT's [SEP]).
    """

    def __init__(self, split: Split, max_length: int) -> None:
        """Raise UserError where the split is of another kind."""
        if split.manifest.kind != LabeledText.name:
            raise UserError(f"{split.folder} has no labels: prepare it with data.label_column=...")
        self.split, self.max_length, self.closing = split, max_length, split.manifest.closing_tokens

    def __len__(self) -> int:
        return self.split.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = truncate(self.split.document(i), self.max_length, self.closing)
        return {"tokens": tokens.astype(np.int64), "label": self.split.label(i)}


def truncate(tokens: np.ndarray, max_length: int, closing: int) -> np.ndarray:
    """Truncate a row to at most `max_length` values, keeping its last `closing` ones."""
    if len(tokens) <= max_length:
        return tokens
    return np.concatenate([tokens[: max_length - closing], tokens[len(tokens) - closing :]])

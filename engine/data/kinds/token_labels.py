"""Words with one label each, as data for token classification have them (CoNLL-2003, named entities or parts of speech)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import DataConfig
from engine.data.columns import Column
from engine.data.document import Document, Span, is_encodable, is_missing, label_name
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, EncodedRows, Frame, Row
from engine.data.kinds.labeled_text import truncate
from engine.data.tokenizer import load_backend
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.shards import Split

NO_LABEL = -100  # label of a token that isn't the first of a labeled word; PyTorch's losses ignore it


@dataclass(frozen=True)
class TokenLabels(DataKind):
    """Words joined by spaces, and a label for the first token of each. Samples: `TokenLabeledRows`."""

    name = "token_labels"
    description = "words with labels"
    hint = "say which column holds lists of words with data.text_column=..., and which lists of their labels with data.label_column=..."

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Match where a label is named, and neither image nor sound; the rows tell whether it is a list."""
        of_rows = config.source in ("files", "huggingface")
        return of_rows and bool(config.label_column) and not config.image_column and not config.audio_column

    def matches_row(self, row: Mapping[str, Any]) -> bool:
        """Match a list of labels."""
        return isinstance(row.get(self.config.label_column or ""), (list, type(None)))

    @property
    def has_labels(self) -> bool:
        """Each word has one."""
        return True

    @property
    def columns(self) -> dict[str, str]:
        """The words and their labels."""
        return {self.config.text_column: "data.text_column", self.config.label_column or "": "data.label_column"}

    @property
    def stored_columns(self) -> tuple[Column, ...]:
        """The label of each token, an index of the manifest's labels, or NO_LABEL."""
        return (Column("labels", "int32", "list"),)

    def check(self) -> None:
        """Raise UserError for a mask, which would move the words."""
        if self.config.mask:
            raise UserError("data.mask changes the text, whose words have labels: leave it out")

    def read(self, rows: Iterable[dict[str, Any]], file: InputFile, counts: Counter[str]) -> Iterator[Row]:
        """Yield text and labeled spans of each row with as many labels as words; a word without a label has no span."""
        for row in rows:
            words, labels = row.get(self.config.text_column), row.get(self.config.label_column or "")
            if not isinstance(words, list) or not all(isinstance(word, str) and is_encodable(word) for word in words):
                counts["without a list of words"] += 1
            elif not isinstance(labels, list) or all(is_missing(label) for label in labels):
                counts["without a label"] += 1
            elif len(words) != len(labels):
                counts["with other numbers of words and labels"] += 1
            else:
                text, spans = join_words(words)
                named = [
                    (start, stop, label_name(label) or "")
                    for (start, stop), label in zip(spans, labels)
                    if not is_missing(label)
                ]
                yield Row(text, spans=tuple(named))

    def labels_of(self, document: Document) -> Iterable[str]:
        """Return the labels of the words."""
        return (label for _, _, label in document.spans)

    @classmethod
    def make_encoder(
        cls, folder: Path, probe: Iterable[str] = (), threads: int | None = None
    ) -> Callable[[list[str]], Any]:
        """Return a function of texts -> (ids, character offsets [tokens, 2]) of each, without special tokens."""
        backend = load_backend(folder)
        backend.encode_special_tokens = True

        def encode(texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            return [(np.asarray(e.ids, np.int64), np.asarray(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]

        return encode

    def encode(
        self,
        documents: Sequence[Document],
        encoder: Callable[[list[str]], Any],
        frame: Frame,
        label_ids: Mapping[str, int],
    ) -> EncodedRows:
        """Tokenize documents and align their labels with the tokens."""
        encodings = encoder([document.text for document in documents])
        tokens, lengths = frame.concatenate([ids for ids, _ in encodings])
        labels = []
        for document, (_, offsets), length in zip(documents, encodings, lengths.tolist(), strict=True):
            row = np.full(length, NO_LABEL, np.int32)
            ids = [label_ids[label] for _, _, label in document.spans]
            firsts = first_tokens(offsets, [(start, stop) for start, stop, _ in document.spans])
            for token, label in zip(firsts, ids, strict=True):
                if token is not None:
                    row[len(frame.before) + token] = label
            labels.append(row)
        return EncodedRows(tokens, lengths, {"labels": labels})


def join_words(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Join words by spaces; return the text and each word's first character and the one after its last."""
    stops = np.cumsum([len(word) + 1 for word in words]).tolist()
    return " ".join(words), [(stop - 1 - len(word), stop - 1) for word, stop in zip(words, stops, strict=True)]


def first_tokens(offsets: np.ndarray, spans: Sequence[tuple[int, int]] | Sequence[Span]) -> list[int | None]:
    """Return the first token that overlaps each span; None where there is none. offsets: first and last character + 1, [L, 2]."""
    tokens: list[int | None] = []
    for start, stop, *_ in spans:
        overlapping = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
        tokens.append(int(overlapping[0]) if len(overlapping) else None)
    return tokens


class TokenLabeledRows:
    """The documents of a split with a label for each token.

    Sample i is {"tokens": int64, "labels": int64}, both [at most max_length], truncated alike; labels are NO_LABEL but at
    the first token of each labeled word.
    """

    def __init__(self, split: Split, max_length: int) -> None:
        """Raise UserError where the split is of another kind."""
        if split.manifest.kind != TokenLabels.name:
            raise UserError(f"{split.folder} has no labels of words: {TokenLabels.hint}")
        self.split, self.max_length, self.closing = split, max_length, split.manifest.closing_tokens

    def __len__(self) -> int:
        return self.split.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens, labels = self.split.document(i), self.split.value("labels", i)
        return {
            "tokens": truncate(tokens, self.max_length, self.closing).astype(np.int64),
            "labels": truncate(labels, self.max_length, self.closing).astype(np.int64),
        }

"""Prepared documents as samples: fixed blocks for pre-training, single rows for labelled tasks."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.data.shards import Split
from engine.errors import UserError


class Blocks:
    """The split's token stream in blocks of `length`, with no padding and no token left out but the last few.

    Sample i is {"tokens": int64 [length + 1]}: inputs are the first `length`, targets the last.
    """

    def __init__(self, split: Split, length: int) -> None:
        """Raise UserError where the split is shorter than one block, or holds labelled rows."""
        if split.manifest.kind != "text":
            raise UserError(
                f"{split.folder} holds labelled rows, which are not packed into blocks: "
                "use objective=classification, or data without labels (data=python_stdlib, or no data.label_column)"
            )
        if split.tokens < length + 1:
            raise UserError(
                f"the {split.name} split has {split.tokens:,} tokens, fewer than one block of {length:,} and its target: "
                f"use data.sequence_length={max(split.tokens - 1, 2)} or less, or more data"
            )
        self.split, self.length = split, length

    def __len__(self) -> int:
        return (self.split.tokens - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        return {"tokens": self.split.stream(i * self.length, (i + 1) * self.length + 1).astype(np.int64)}


class Rows:
    """The split's documents with their labels.

    Sample i is {"tokens": int64 [at most max_length], "label": int}; one that is too long keeps its closing special
    tokens (BERT's [SEP]) and loses those before them.
    """

    def __init__(self, split: Split, max_length: int) -> None:
        """Raise UserError where the split has no labels."""
        if split.manifest.kind != "labelled":
            raise UserError(f"{split.folder} has no labels: prepare it with data.label_column=...")
        self.split, self.max_length, self.closing = split, max_length, split.manifest.closing_tokens

    def __len__(self) -> int:
        return self.split.rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = self.split.document(i)
        if len(tokens) > self.max_length:
            tokens = np.concatenate([tokens[: self.max_length - self.closing], tokens[len(tokens) - self.closing :]])
        return {"tokens": tokens.astype(np.int64), "label": self.split.label(i)}

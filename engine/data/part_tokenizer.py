"""The second pass over a part: batches of one split, encoded on a thread one batch ahead, framed, and written as shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.data.document import SPLITS, Document, Part
from engine.data.kinds import EncodedRows, Frame
from engine.data.scan import DROPPED
from engine.data.shards import ShardWriter
from engine.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
WriteShard = Callable[[str, bytes], object]  # name, content
ShardFacts = dict[str, list[dict[str, Any]]]  # split -> what the manifest says of each of its shards

BATCH_CHARACTERS = 2**21  # encoded at once


@dataclass(frozen=True)
class PartTokenizer:
    """How a part becomes shards; the same for all parts."""

    frame: Frame
    shard_tokens: int
    vocab_size: int
    labels: tuple[str, ...]  # a label is stored as its index in these

    def run(
        self,
        part: Part,
        documents: Iterable[Document],
        splits: np.ndarray,
        encoder: Callable[[list[str]], Any],
        write: WriteShard,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> ShardFacts:
        """Write the shards of a part's documents and return their facts; `on_progress` is called with the number of documents done."""
        columns = part.kind.stored_columns
        writers = {
            split: ShardWriter(write, f"{split}-{part.number:05d}", self.vocab_size, self.shard_tokens, columns)
            for split in SPLITS
        }
        label_ids: Mapping[str, int] = {label: i for i, label in enumerate(self.labels)}

        def encode(batch: Batch) -> tuple[Batch, EncodedRows]:
            return batch, part.kind.encode(batch.documents, encoder, self.frame, label_ids)

        done = 0
        for batch, rows in _map_one_ahead(encode, _batches(part, documents, splits)):
            writers[batch.split].add(rows.tokens, rows.lengths, rows.columns)
            done += len(batch.documents)
            on_progress(done)
        return {split: writer.close() for split, writer in writers.items()}


@dataclass
class Batch:
    """Documents of one split that are encoded together."""

    split: str
    documents: list[Document] = dataclasses.field(default_factory=list)
    size: int = 0  # characters of text and bytes of signals


def _batches(part: Part, documents: Iterable[Document], splits: np.ndarray) -> Iterator[Batch]:
    batches = {number: Batch(split) for number, split in enumerate(SPLITS)}
    count = 0
    for count, document in enumerate(documents, start=1):
        if count > len(splits):
            break
        if (number := int(splits[count - 1])) == DROPPED:
            continue
        batch = batches[number]
        batch.documents.append(document)
        batch.size += len(document.text) + (0 if document.signal is None else document.signal.nbytes)
        if batch.size >= BATCH_CHARACTERS:
            yield batch
            batches[number] = Batch(batch.split)
    if count != len(splits):
        raise UserError(
            f"{part.pieces[0].file.address} gave other documents the second time it was read: "
            "do not change the input meanwhile, and use a data.filter that always gives the same answer"
        )
    yield from (batch for batch in batches.values() if batch.documents)


def _map_one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function to each item on a thread, one item ahead of the one that is yielded."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            following = pool.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def encode_nothing(texts: list[str]) -> list[np.ndarray]:
    """Return no tokens for each text: the encoder of data without text."""
    return [np.empty(0, np.uint32) for _ in texts]

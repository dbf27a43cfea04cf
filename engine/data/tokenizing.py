"""A part's documents to its shards: batches of one split, encoded one ahead on a thread, framed, written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.data.corpus import SPLITS, Document, Part
from engine.data.scan import DROPPED
from engine.data.shards import ShardWriter
from engine.data.tokenizer import Encoder, Specials
from engine.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Write = Callable[[str, bytes], object]  # name, content
Shards = dict[str, list[dict[str, Any]]]  # split -> the facts of its shards

BATCH_CHARACTERS = 2**21  # encoded at once


@dataclass(frozen=True)
class Framing:
    """What is put around each document's tokens: eos after a text, and what its tokenizer frames a labelled row with."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, special: Specials, labelled: bool) -> Framing:
        """Read it from a tokenizer's special ids."""
        return cls(tuple(special.opening), tuple(special.closing)) if labelled else cls((), (special.eos_id,))

    def lay(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Lay rows of tokens end to end; returns the tokens and each row's length."""
        before, after = np.array(self.before, np.uint32), np.array(self.after, np.uint32)
        lengths = np.array([len(row) for row in rows], np.int64) + len(before) + len(after)
        if not len(before):
            return np.concatenate([piece for row in rows for piece in (row, after)]), lengths
        return np.concatenate([piece for row in rows for piece in (before, row, after)]), lengths


@dataclass(frozen=True)
class Tokenizing:
    """How a part becomes shards."""

    framing: Framing
    shard_tokens: int
    vocab_size: int
    labelled: bool

    def run(
        self,
        part: Part,
        documents: Iterable[Document],
        splits: np.ndarray,
        label_ids: np.ndarray,
        encode: Encoder,
        write: Write,
        heard: Callable[[int], None] = lambda done: None,
    ) -> Shards:
        """Write the shards of a part's documents and return their facts by split; `heard` is told how many are done."""
        writers = {
            split: ShardWriter(write, f"{split}-{part.number:05d}", self.vocab_size, self.shard_tokens, self.labelled)
            for split in SPLITS
        }

        def encoded(batch: Batch) -> tuple[Batch, np.ndarray, np.ndarray]:
            return batch, *self.framing.lay(encode([document.text for document in batch.documents]))

        done = 0
        for batch, tokens, lengths in _ahead(encoded, _batches(part, documents, splits)):
            labels = label_ids[batch.numbers] if self.labelled else None
            writers[batch.split].add(tokens, lengths, labels, batch.signals())
            done += len(batch.documents)
            heard(done)
        return {split: writer.close() for split, writer in writers.items()}


@dataclass
class Batch:
    """Documents of one split that are encoded together, and their numbers in their part."""

    split: str
    documents: list[Document] = dataclasses.field(default_factory=list)
    numbers: list[int] = dataclasses.field(default_factory=list)
    characters: int = 0  # and bytes of signals

    def signals(self) -> list[np.ndarray]:
        """Return the documents' images or sounds, if they are."""
        return [document.signal for document in self.documents if document.signal is not None]


def _batches(part: Part, documents: Iterable[Document], splits: np.ndarray) -> Iterator[Batch]:
    held = {number: Batch(split) for number, split in enumerate(SPLITS)}
    count = 0
    for count, document in enumerate(documents, start=1):
        if count > len(splits):
            break
        if (number := int(splits[count - 1])) == DROPPED:
            continue
        batch = held[number]
        batch.documents.append(document)
        batch.numbers.append(count - 1)
        batch.characters += len(document.text) + (0 if document.signal is None else document.signal.nbytes)
        if batch.characters >= BATCH_CHARACTERS:
            yield batch
            held[number] = Batch(batch.split)
    if count != len(splits):
        raise UserError(
            f"{part.pieces[0].file.place} gave other documents the second time it was read: "
            "do not change the input meanwhile, and use a data.filter that always gives the same answer"
        )
    yield from (batch for batch in held.values() if batch.documents)


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function to each item on a thread, one item ahead of what is asked for."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            following = pool.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def no_tokens(texts: list[str]) -> list[np.ndarray]:
    """Encode the texts of images that have none."""
    return [np.empty(0, np.uint32) for _ in texts]

"""Prepared documents as samples: fixed blocks or best-fit bins for pre-training, single rows for labelled tasks, and mixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config import DataConfig, source_options
from engine.data.order import permute
from engine.data.shards import Split
from engine.errors import UserError


@dataclass(frozen=True)
class Packing:
    """How documents become samples."""

    how: str = "end_to_end"  # data.packing
    within_documents: bool = False  # data.within_documents
    weights: Mapping[str, float] = field(default_factory=dict)  # source -> times that an epoch shows it; else 1

    @classmethod
    def of(cls, data: DataConfig) -> Packing:
        """Read it from the options."""
        weights = {name: float(options.get("weight", 1.0)) for name, options in source_options(data).items()}
        return cls(data.packing, data.within_documents, weights)


def pack(split: Split, length: int, packing: Packing, overlap: int) -> Blocks | Bins | Mix:
    """Return a split's documents as samples of up to `length` tokens of input.

    `overlap` is 1 where the targets are the next tokens: a sample then has one token more than inputs. Sources are packed
    apart, and the training split shows each as often as its weight says. Raises UserError where there is too little.
    """
    if split.manifest.kind != "text":
        raise UserError(
            f"{split.folder} holds labelled rows, which are not packed into blocks: "
            "use objective=classification, or data without labels (data=python_stdlib, or no data.label_column)"
        )

    def packed(part: Split) -> Blocks | Bins:
        if packing.how == "best_fit":
            return Bins(part, length + overlap, overlap)
        return Blocks(part, length, packing.within_documents)

    sources = split.by_source()
    if len(sources) == 1 and set(packing.weights.values()) <= {1.0}:
        return packed(split)
    weights = packing.weights if split.name == "train" else {}
    return Mix([packed(part) for part in sources.values()], [weights.get(name, 1.0) for name in sources])


class Blocks:
    """A split's token stream in blocks of `length`, with no padding and no token left out but the last few.

    Sample i is {"tokens": int64 [length + 1]}: inputs are the first `length`, targets the last. With `boundaries` it also
    has "starts": int64 [documents], where in it each document begins, the first (perhaps begun before) at 0.
    """

    padding = 0.0

    def __init__(self, split: Split, length: int, boundaries: bool = False) -> None:
        """Raise UserError where the split is shorter than one block."""
        if split.tokens < length + 1:
            raise UserError(
                f"the {split.name} split{split.of_source} has {split.tokens:,} tokens, fewer than one block of {length:,} and its "
                f"target: use data.sequence_length={max(split.tokens - 1, 2)} or less, or more data"
            )
        self.split, self.length, self.boundaries = split, length, boundaries

    def __len__(self) -> int:
        return (self.split.tokens - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        first, end = i * self.length, (i + 1) * self.length + 1
        sample: dict[str, Any] = {"tokens": self.split.stream(first, end).astype(np.int64)}
        if self.boundaries:
            inside = self.split.starts(first + 1, end) - first
            sample["starts"] = np.concatenate([np.zeros(1, np.int64), inside])
        return sample


class Bins:
    """Documents put together so that few are cut and little is padded: best-fit-decreasing (Ding et al. 2024).

    "Fewer truncations improve language modeling", https://arxiv.org/abs/2404.10830. A document longer than `capacity`
    tokens is cut into pieces of that size, each beginning with the last `overlap` tokens of the one before. Sample i is
    {"tokens": int64 [at most capacity], "starts": int64 [pieces]}. What is held is bounded by the number of documents.
    """

    def __init__(self, split: Split, capacity: int, overlap: int = 0) -> None:
        """Raise UserError where the split has no document that gives a target."""
        self.split, self.capacity = split, capacity
        self.documents, self.offsets, self.lengths = cut(split.lengths, capacity, overlap)
        if not len(self.lengths):
            raise UserError(f"no document of the {split.name} split{split.of_source} has two tokens: give longer texts")
        self.order, self.first = best_fit(self.lengths, capacity)

    @property
    def padding(self) -> float:
        """The share of all places that no token takes, from 0 to 1."""
        return 1 - int(self.lengths.sum()) / (len(self) * self.capacity)

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"bin {i} of {len(self)}")
        pieces = self.order[self.first[i] : self.first[i + 1]]
        tokens = []
        for piece in pieces:
            start = self.offsets[piece]
            tokens.append(self.split.document(self.documents[piece])[start : start + self.lengths[piece]])
        starts = np.cumsum(self.lengths[pieces]) - self.lengths[pieces]
        return {"tokens": np.concatenate(tokens).astype(np.int64), "starts": starts}


class Mix:
    """Several sources in one: an epoch shows each sample of source s `weights[s]` times, by virtual repetition.

    Sample i has no end: epoch i // len(mix) goes on in each source where the one before ended. With a weight of 0.5 two
    epochs show each of its samples once, each epoch another half; 1.5 shows all once and another half twice. Nothing is
    held but the sizes, and the ids of an epoch differ from those of every other (see `Order`).
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]) -> None:
        """Take the samples of each source and its weight, above 0."""
        self.parts = list(parts)
        self.counts = [max(1, round(len(part) * weight)) for part, weight in zip(parts, weights, strict=True)]
        self.first = np.cumsum([0, *self.counts])

    @property
    def padding(self) -> float:
        """The share of an epoch's places that no token takes, from 0 to 1."""
        return sum(part.padding * count for part, count in zip(self.parts, self.counts)) / len(self)

    def __len__(self) -> int:
        return int(self.first[-1])

    def find(self, i: int) -> tuple[int, int]:
        """Return the source of virtual sample i and the number of the sample there."""
        epoch, place = divmod(int(i), len(self))
        source = int(np.searchsorted(self.first, place, side="right")) - 1
        size, count = len(self.parts[source]), self.counts[source]
        again, at = divmod(epoch * count + place - int(self.first[source]), size)
        if count % size:  # an epoch ends within the source: another sample of it each time, not its first files
            at = int(permute(np.array([at]), size, source, again)[0])
        return source, at

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < 0:
            raise IndexError(f"sample {i}")
        source, at = self.find(i)
        sample: dict[str, Any] = self.parts[source][at]
        return sample


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


def cut(lengths: np.ndarray, capacity: int, overlap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents of these lengths into pieces of at most `capacity`: (document, offset, length) of each, int64 [pieces].

    A last piece that is nothing but overlap is left out, since the piece before has all of it.
    """
    stride = capacity - overlap
    pieces = np.maximum(-(-(lengths - overlap) // stride), 0)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = number * stride
    return documents, offsets, np.minimum(lengths[documents] - offsets, capacity)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into bins, the longest first, each into the fullest bin that has room for it.

    Returns the items by bin, int64 [items], in their own order within one, and where each bin begins, int64 [bins + 1].
    Items of one length are placed together, and a bit set says which amounts of room there are, so that the time grows
    with the number of distinct lengths and rooms, not with items times bins; the result is that of one by one.
    """
    ranked = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bin_of = np.empty(len(lengths), np.int64)
    rooms: dict[int, list[np.ndarray]] = {}  # room in tokens -> bins that have just that
    there, bins, at = 0, 0, 0  # bit r of `there` is set where rooms[r] is
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist()):
        items, at = ranked[at : at + count], at + count
        while len(items):
            if fitting := there >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                there ^= 1 << room
                held = rooms.pop(room)
                open_bins = held[0] if len(held) == 1 else np.concatenate(held)
            else:
                room = capacity
                open_bins = np.arange(bins, bins - (-len(items) // (capacity // size)))
                bins += len(open_bins)
            each = room // size  # a bin that took one is now the fullest, so it takes the next too
            used = min(len(open_bins), -(-len(items) // each))
            placed = min(len(items), used * each)
            bin_of[items[:placed]] = np.repeat(open_bins[:used], each)[:placed]
            items, last = items[placed:], placed - (used - 1) * each
            for left, group in (
                (room - each * size, open_bins[: used - 1]),
                (room - last * size, open_bins[used - 1 : used]),
                (room, open_bins[used:]),
            ):
                if left and len(group):
                    rooms.setdefault(left, []).append(group)
                    there |= 1 << left
    return np.argsort(bin_of, kind="stable"), np.cumsum([0, *np.bincount(bin_of, minlength=bins)])

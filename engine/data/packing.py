"""Packing: prepared documents as samples of fixed length, in blocks or best-fit bins, and mixes of sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config import DataConfig, source_options
from engine.data.kinds import kind_class
from engine.data.kinds.text import Text
from engine.data.order import permute
from engine.data.shards import Split
from engine.errors import UserError


@dataclass(frozen=True)
class Packing:
    """How documents are packed into samples."""

    method: str = "end_to_end"  # data.packing
    within_documents: bool = False  # data.within_documents
    weights: Mapping[str, float] = field(
        default_factory=dict
    )  # source -> times an epoch shows it; 1 where it isn't named

    @classmethod
    def from_config(cls, data: DataConfig) -> Packing:
        """Take it from the options."""
        weights = {name: float(options.get("weight", 1.0)) for name, options in source_options(data).items()}
        return cls(data.packing, data.within_documents, weights)


def pack(split: Split, length: int, packing: Packing, overlap: int) -> Blocks | Bins | Mix:
    """Return a split's documents as samples of up to `length` tokens of input.

    `overlap` is 1 where the targets are the next tokens: a sample then has one token more than inputs. Each source is packed
    by itself, and the training split shows it as often as its weight says. Raises UserError for data of another kind than
    text, or too little of it.
    """
    if split.manifest.kind != Text.name:
        description = kind_class(split.manifest.kind).description
        raise UserError(
            f"{split.folder} holds {description}, which are not packed into blocks: use their objective, or {Text.hint}"
        )

    def pack_source(part: Split) -> Blocks | Bins:
        if packing.method == "best_fit":
            return Bins(part, length + overlap, overlap)
        return Blocks(part, length, packing.within_documents)

    sources = split.by_source()
    if len(sources) == 1 and set(packing.weights.values()) <= {1.0}:
        return pack_source(split)
    weights = packing.weights if split.name == "train" else {}
    return Mix([pack_source(part) for part in sources.values()], [weights.get(name, 1.0) for name in sources])


class Blocks:
    """A split's token stream in blocks of `length`, without padding; only an incomplete last block is dropped.

    Sample i is {"tokens": int64 [length + 1]}: the first `length` are inputs, the last `length` targets. With `boundaries`
    it also has "starts": int64 [documents], the position at which each document begins; 0 for the first, which may have
    begun in an earlier block.
    """

    padding = 0.0

    def __init__(self, split: Split, length: int, boundaries: bool = False) -> None:
        """Raise UserError where the split is shorter than one block."""
        if split.num_tokens < length + 1:
            raise UserError(
                f"the {split.name} split{split.source_suffix} has {split.num_tokens:,} tokens, fewer than one block of {length:,} and its "
                f"target: use data.sequence_length={max(split.num_tokens - 1, 2)} or less, or more data"
            )
        self.split, self.length, self.boundaries = split, length, boundaries

    def __len__(self) -> int:
        return (self.split.num_tokens - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        first, end = i * self.length, (i + 1) * self.length + 1
        sample: dict[str, Any] = {"tokens": self.split.token_range(first, end).astype(np.int64)}
        if self.boundaries:
            inside = self.split.document_starts(first + 1, end) - first
            sample["starts"] = np.concatenate([np.zeros(1, np.int64), inside])
        return sample


class Bins:
    """Documents packed so that few are truncated and little is padded: best-fit-decreasing (Ding et al. 2024).

    "Fewer truncations improve language modeling", https://arxiv.org/abs/2404.10830. A document longer than `capacity`
    tokens is cut into pieces of that size, each beginning with the last `overlap` tokens of the one before. Sample i is
    {"tokens": int64 [at most capacity], "starts": int64 [pieces]}. Memory grows with the number of documents.
    """

    def __init__(self, split: Split, capacity: int, overlap: int = 0) -> None:
        """Raise UserError where the split has no document that gives a target."""
        self.split, self.capacity = split, capacity
        self.documents, self.offsets, self.lengths = split_documents(split.lengths, capacity, overlap)
        if not len(self.lengths):
            raise UserError(
                f"no document of the {split.name} split{split.source_suffix} has two tokens: give longer texts"
            )
        self.order, self.first = best_fit(self.lengths, capacity)

    @property
    def padding(self) -> float:
        """The share of padding, from 0 to 1."""
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

    Sample ids are unbounded: epoch i // len(mix) goes on in each source where the previous one ended. With a weight of 0.5
    two epochs show each of its samples once, each epoch another half; 1.5 shows all once and another half twice. Only the
    sizes are held in memory, and the ids of an epoch differ from those of every other (see `DataOrder`).
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]) -> None:
        """Take the samples of each source and its weight, above 0."""
        self.parts = list(parts)
        self.counts = [max(1, round(len(part) * weight)) for part, weight in zip(parts, weights, strict=True)]
        self.first = np.cumsum([0, *self.counts])

    @property
    def padding(self) -> float:
        """The share of padding in an epoch, from 0 to 1."""
        return sum(part.padding * count for part, count in zip(self.parts, self.counts)) / len(self)

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """Return the source of virtual sample i and the number of the sample in it."""
        epoch, position = divmod(int(i), len(self))
        source = int(np.searchsorted(self.first, position, side="right")) - 1
        size, count = len(self.parts[source]), self.counts[source]
        repetition, sample = divmod(epoch * count + position - int(self.first[source]), size)
        if count % size:  # epochs end within the source: shuffle it, so that its first files are not shown more often
            sample = int(permute(np.array([sample]), size, source, repetition)[0])
        return source, sample

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < 0:
            raise IndexError(f"sample {i}")
        source, number = self.locate(i)
        sample: dict[str, Any] = self.parts[source][number]
        return sample


def split_documents(lengths: np.ndarray, capacity: int, overlap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents of these lengths into pieces of at most `capacity`: (document, offset, length) of each, int64 [pieces].

    A last piece that would be only overlap is left out, since the piece before has all of it.
    """
    stride = capacity - overlap
    pieces = np.maximum(-(-(lengths - overlap) // stride), 0)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = number * stride
    return documents, offsets, np.minimum(lengths[documents] - offsets, capacity)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into bins, the longest first, each into the fullest bin that has space for it.

    Returns the items by bin, int64 [items], in their own order within a bin, and where each bin begins, int64 [bins + 1].
    Items of equal length are placed together, and a bit set tells which amounts of free space exist, so that the time
    grows with the number of distinct lengths and free spaces, not with items times bins; the result is that of placing
    items one by one.
    """
    ranked = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bin_of = np.empty(len(lengths), np.int64)
    bins_by_space: dict[int, list[np.ndarray]] = {}  # free tokens -> bins with exactly so many
    spaces, bins, first = 0, 0, 0  # bit s of `spaces` is set where bins_by_space has s
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist()):
        items, first = ranked[first : first + count], first + count
        while len(items):
            if fitting := spaces >> size:
                space = size + (fitting & -fitting).bit_length() - 1
                spaces ^= 1 << space
                groups = bins_by_space.pop(space)
                open_bins = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                space = capacity
                open_bins = np.arange(bins, bins - (-len(items) // (capacity // size)))
                bins += len(open_bins)
            each = space // size  # a bin that took one item is now the fullest, so it takes the next too
            used = min(len(open_bins), -(-len(items) // each))
            placed = min(len(items), used * each)
            bin_of[items[:placed]] = np.repeat(open_bins[:used], each)[:placed]
            items, last = items[placed:], placed - (used - 1) * each
            for left, group in (
                (space - each * size, open_bins[: used - 1]),
                (space - last * size, open_bins[used - 1 : used]),
                (space, open_bins[used:]),
            ):
                if left and len(group):
                    bins_by_space.setdefault(left, []).append(group)
                    spaces |= 1 << left
    return np.argsort(bin_of, kind="stable"), np.cumsum([0, *np.bincount(bin_of, minlength=bins)])

"""Tokens on disk: Arrow IPC files that are memory-mapped, so that opening a split reads none of them."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.data.manifest import Manifest
from engine.data.remote_store import at_hand
from engine.errors import UserError

SIGNAL_BYTES = 16  # of pixels or sound that fill a shard as much as a token does


class Columns(NamedTuple):
    """A shard, mapped into memory: the rows' values end to end, and where each row begins and ends."""

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    signals: np.ndarray  # pixels, or the samples of sounds
    sound_offsets: np.ndarray


class ShardWriter:
    """Collect the documents of one split and give them out as shards of about `shard_tokens` tokens."""

    def __init__(
        self,
        write: Callable[[str, bytes], object],
        stem: str,
        vocab_size: int,
        shard_tokens: int,
        labelled: bool = False,
    ) -> None:
        """`write(name, content)` is called for each shard, named <stem>-<number>.arrow."""
        self.write, self.stem, self.shard_tokens, self.labelled = write, stem, shard_tokens, labelled
        self.dtype = np.uint32 if vocab_size > 65535 else np.uint16
        self.shards: list[dict[str, Any]] = []
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._signals: list[np.ndarray] = []
        self._held = self._signal_bytes = 0

    def add(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        labels: np.ndarray | None = None,
        signals: Sequence[np.ndarray] = (),
    ) -> None:
        """Add documents: their tokens end to end, and the length and label of each.

        `signals` are their images, uint8 [S, S, 3] of one size, or their sounds, int16 [samples].
        """
        self._tokens.append(tokens.astype(self.dtype))
        self._lengths.append(lengths)
        if labels is not None:
            self._labels.append(labels)
        self._signals += signals
        self._signal_bytes += sum(signal.nbytes for signal in signals)
        self._held += len(tokens)
        if self._held + self._signal_bytes // SIGNAL_BYTES >= self.shard_tokens:
            self._write()

    def close(self) -> list[dict[str, Any]]:
        """Write what is held and return the shards: file, rows, tokens, bytes, sha256."""
        if self._lengths:
            self._write()
        return self.shards

    def _write(self) -> None:
        import pyarrow as pa

        lengths = np.concatenate(self._lengths)
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        columns = {"tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._tokens)))}
        if self.labelled:
            columns["label"] = pa.array(np.concatenate(self._labels).astype(np.int32))
        if self._signals:
            values = pa.array(np.concatenate([signal.ravel() for signal in self._signals]))
            if self._signals[0].ndim == 3:
                columns["image"] = pa.FixedSizeListArray.from_arrays(values, self._signals[0].size)
            else:
                ends = np.cumsum([0, *map(len, self._signals)]).astype(np.int32)
                columns["sound"] = pa.ListArray.from_arrays(pa.array(ends), values)
        batch = pa.record_batch(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        name = f"{self.stem}-{len(self.shards):05d}.arrow"
        self.write(name, content)
        self.shards.append(
            {
                "file": name,
                "rows": len(lengths),
                "tokens": self._held,
                "bytes": content.size,
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
        self._tokens, self._lengths, self._labels, self._signals = [], [], [], []
        self._held = self._signal_bytes = 0


class Split:
    """The documents of one split, in order, over all its shards. Cheap to open and to pickle; shards open when touched."""

    def __init__(self, folder: Path, name: str, manifest: Manifest, source: str | None = None) -> None:
        """Take the shards of one split; of one source's, if given."""
        shards = [shard for shard in manifest.splits[name]["shards"] if source in (None, shard["source"])]
        self.folder, self.name, self.manifest, self.source = Path(folder), name, manifest, source
        self.rows: int = sum(shard["rows"] for shard in shards)
        self.tokens: int = sum(shard["tokens"] for shard in shards)
        self._files = [shard["file"] for shard in shards]
        self._first_row = np.cumsum([0, *(shard["rows"] for shard in shards)])
        self._first_token = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self._open: dict[int, Columns] = {}

    @classmethod
    def open(cls, folder: Path | str, name: str) -> Split:
        """Open "train", "validation" or "test" of a prepared folder. Raises UserError where it has no such split."""
        manifest = Manifest.load(Path(folder))
        if not manifest.splits.get(name, {}).get("shards"):
            raise UserError(
                f"{folder} has no {name} documents: prepare it with data.{name}_path=... or data.{name}_fraction above 0"
            )
        return cls(Path(folder), name, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, (self.folder, self.name, self.manifest, self.source)

    def __len__(self) -> int:
        return self.rows

    def by_source(self) -> dict[str, Split]:
        """Return the documents of each source that has some here, in the manifest's order."""
        there = dict.fromkeys(shard["source"] for shard in self.manifest.splits[self.name]["shards"])
        return {source: Split(self.folder, self.name, self.manifest, source) for source in there}

    @property
    def of_source(self) -> str:
        """Words for a message: ` of wiki` where this is but one source."""
        return f" of {self.source}" if self.source and len(self.manifest.origins) > 1 else ""

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document i, [length], read-only and without a copy."""
        shard, row = self._find(self._first_row, i, self.rows)
        held = self._shard(shard)
        return held.tokens[held.offsets[row] : held.offsets[row + 1]]

    def label(self, i: int) -> int:
        """Return the label of document i, an index of the manifest's labels."""
        shard, row = self._find(self._first_row, i, self.rows)
        return int(self._shard(shard).labels[row])

    def image(self, i: int) -> np.ndarray:
        """Return the pixels of image i: uint8 [S, S, 3], read-only and without a copy."""
        shard, row = self._find(self._first_row, i, self.rows)
        side = self.manifest.image_size
        found: np.ndarray = self._shard(shard).signals.reshape(-1, side, side, 3)[row]
        return found

    def sound(self, i: int) -> np.ndarray:
        """Return the samples of sound i: int16 [samples], read-only and without a copy."""
        shard, row = self._find(self._first_row, i, self.rows)
        held = self._shard(shard)
        return held.signals[held.sound_offsets[row] : held.sound_offsets[row + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [rows]."""
        return np.concatenate([np.diff(self._shard(i).offsets) for i in range(len(self._files))]).astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of each document: int32 [rows]."""
        return np.concatenate([self._shard(i).labels for i in range(len(self._files))])

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of all documents laid end to end; without a copy inside one shard."""
        if not 0 <= start < stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        first, last = np.searchsorted(self._first_token, [start, stop - 1], side="right") - 1
        pieces = [
            self._shard(shard).tokens[max(0, start - self._first_token[shard]) : stop - self._first_token[shard]]
            for shard in range(first, last + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Return where documents begin among tokens [start, stop) of the stream: int64, rising."""
        first, last = np.searchsorted(self._first_token, [start, stop - 1], side="right") - 1
        found = []
        for shard in range(first, last + 1):
            offsets = self._shard(shard).offsets[:-1]
            low, high = np.searchsorted(offsets, [start - self._first_token[shard], stop - self._first_token[shard]])
            found.append(offsets[low:high].astype(np.int64) + self._first_token[shard])
        return np.concatenate(found)

    def _find(self, starts: np.ndarray, i: int, size: int) -> tuple[int, int]:
        if not 0 <= i < size:
            raise IndexError(f"document {i} of {size}")
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        return shard, i - int(starts[shard])

    def _shard(self, shard: int) -> Columns:
        """Return the columns of one shard, mapped into memory."""
        if shard not in self._open:
            import pyarrow as pa

            with at_hand(self.folder, self._files[shard]).open(
                "rb"
            ) as file:  # Arrow's own map asks for all pages at once
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            batch = pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0)
            lists = batch.column("tokens")
            labels = batch.column("label").to_numpy() if "label" in batch.schema.names else np.empty(0, np.int32)
            signals, sound_offsets = np.empty(0, np.uint8), np.empty(0, np.int32)
            if "image" in batch.schema.names:
                signals = batch.column("image").values.to_numpy()
            elif "sound" in batch.schema.names:
                sounds = batch.column("sound")
                signals, sound_offsets = sounds.values.to_numpy(), sounds.offsets.to_numpy()
            self._open[shard] = Columns(
                lists.values.to_numpy(), lists.offsets.to_numpy(), labels, signals, sound_offsets
            )
        return self._open[shard]

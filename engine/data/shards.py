"""Shards: Arrow IPC files of tokens and other columns, memory-mapped, so that opening a split reads none of them."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.columns import Column, Values
from engine.data.manifest import Manifest
from engine.data.remote_store import local_shard
from engine.errors import UserError


class ShardWriter:
    """Collect the documents of one split and write shards of about `shard_tokens` tokens."""

    def __init__(
        self,
        write: Callable[[str, bytes], object],
        stem: str,
        vocab_size: int,
        shard_tokens: int,
        columns: Sequence[Column] = (),
    ) -> None:
        """`write(name, content)` is called for each shard, named <stem>-<number>.arrow."""
        self.write, self.stem, self.shard_tokens, self.columns = write, stem, shard_tokens, columns
        self.dtype = np.uint32 if vocab_size > 65535 else np.uint16
        self.shards: list[dict[str, Any]] = []
        self._clear()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, values: Mapping[str, Sequence[Any]] | None = None) -> None:
        """Add documents: their tokens end to end, each one's number of tokens, and its value in each other column."""
        self._tokens.append(tokens.astype(self.dtype))
        self._lengths.append(lengths)
        self._num_tokens += len(tokens)
        for column in self.columns:
            added = (values or {})[column.name]
            self._values[column.name] += added
            if column.bytes_per_token:
                self._signal_bytes += sum(value.nbytes for value in added)
        bytes_per_token = max((column.bytes_per_token for column in self.columns), default=0) or 1
        if self._num_tokens + self._signal_bytes // bytes_per_token >= self.shard_tokens:
            self._write()

    def close(self) -> list[dict[str, Any]]:
        """Write what is left and return the shards: file, rows, tokens, bytes, sha256."""
        if self._lengths:
            self._write()
        return self.shards

    def _clear(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._values: dict[str, list[Any]] = {column.name: [] for column in self.columns}
        self._num_tokens = self._signal_bytes = 0

    def _write(self) -> None:
        import pyarrow as pa

        lengths = np.concatenate(self._lengths)
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        arrays = {"tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(self._tokens)))}
        arrays |= {column.name: column.to_arrow(self._values[column.name]) for column in self.columns}
        batch = pa.record_batch(arrays)
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
                "tokens": self._num_tokens,
                "bytes": content.size,
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
        self._clear()


class Split:
    """The documents of one split, in order, over all its shards. Cheap to open and to pickle; a shard opens when it is read."""

    def __init__(self, folder: Path, name: str, manifest: Manifest, source: str | None = None) -> None:
        """Take the shards of one split; of one source's, if given."""
        shards = [shard for shard in manifest.splits[name]["shards"] if source in (None, shard["source"])]
        self.folder, self.name, self.manifest, self.source = Path(folder), name, manifest, source
        self.num_rows: int = sum(shard["rows"] for shard in shards)
        self.num_tokens: int = sum(shard["tokens"] for shard in shards)
        self._files = [shard["file"] for shard in shards]
        self._first_row = np.cumsum([0, *(shard["rows"] for shard in shards)])
        self._first_token = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self._open: dict[int, dict[str, Values]] = {}

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
        return self.num_rows

    def by_source(self) -> dict[str, Split]:
        """Return the documents of each source that has some in this split, in the manifest's order."""
        sources = dict.fromkeys(shard["source"] for shard in self.manifest.splits[self.name]["shards"])
        return {source: Split(self.folder, self.name, self.manifest, source) for source in sources}

    @property
    def source_suffix(self) -> str:
        """Words for a message: ` of wiki` where this is one source of several, else nothing."""
        return f" of {self.source}" if self.source and len(self.manifest.origins) > 1 else ""

    def value(self, column: str, i: int) -> np.ndarray:
        """Return what document i has in a column: an array [its length], read-only and without a copy."""
        if not 0 <= i < self.num_rows:
            raise IndexError(f"document {i} of {self.num_rows}")
        shard = int(np.searchsorted(self._first_row, i, side="right")) - 1
        return self._shard(shard)[column][i - int(self._first_row[shard])]

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document i, [length], read-only and without a copy."""
        return self.value("tokens", i)

    def label(self, i: int) -> int:
        """Return the label of document i, an index of the manifest's labels."""
        return int(self.value("label", i)[0])

    def image(self, i: int) -> np.ndarray:
        """Return the pixels of image i: uint8 [S, S, 3], read-only and without a copy."""
        side = self.manifest.image_size
        return self.value("image", i).reshape(side, side, 3)

    def sound(self, i: int) -> np.ndarray:
        """Return the samples of sound i: int16 [samples], read-only and without a copy."""
        return self.value("sound", i)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [rows]."""
        return np.concatenate([np.diff(self._token_offsets(i)) for i in range(len(self._files))]).astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of each document: int32 [rows]; empty where there is not one a document."""
        none = Values(np.empty(0, np.int32))
        return np.concatenate([self._shard(i).get("label", none).flat for i in range(len(self._files))])

    def token_range(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of all documents laid end to end; without a copy inside one shard."""
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        first, last = np.searchsorted(self._first_token, [start, stop - 1], side="right") - 1
        pieces = [
            self._shard(shard)["tokens"].flat[
                max(0, start - self._first_token[shard]) : stop - self._first_token[shard]
            ]
            for shard in range(first, last + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return where documents begin among tokens [start, stop) of the stream: int64, ascending."""
        first, last = np.searchsorted(self._first_token, [start, stop - 1], side="right") - 1
        starts = []
        for shard in range(first, last + 1):
            offsets = self._token_offsets(shard)[:-1]
            low, high = np.searchsorted(offsets, [start - self._first_token[shard], stop - self._first_token[shard]])
            starts.append(offsets[low:high].astype(np.int64) + self._first_token[shard])
        return np.concatenate(starts)

    def _token_offsets(self, shard: int) -> np.ndarray:
        offsets = self._shard(shard)["tokens"].offsets
        assert offsets is not None
        return offsets

    def _shard(self, shard: int) -> dict[str, Values]:
        """Return the columns of one shard, mapped into memory."""
        if shard not in self._open:
            import pyarrow as pa

            # Arrow's own memory map would ask for all pages at once.
            with local_shard(self.folder, self._files[shard]).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            batch = pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0)
            self._open[shard] = {name: Values.from_arrow(batch.column(name)) for name in batch.schema.names}
        return self._open[shard]

"""The Arrow columns of a shard beside its tokens: how a kind of data declares them, and how they are written and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Column:
    """A column of a shard, with one value a row: a number, an array of a fixed size, or a list of any length."""

    name: str
    dtype: str  # as numpy names it
    layout: str  # "scalar", "fixed" or "list"
    bytes_per_token: int = 0  # bytes of values that fill a shard as much as one token; 0: they don't count

    def to_arrow(self, values: Sequence[Any]) -> Any:
        """Return the Arrow array of the rows' values."""
        import pyarrow as pa

        if self.layout == "scalar":
            return pa.array(np.asarray(values, self.dtype))
        flat = pa.array(np.concatenate([np.ravel(value) for value in values]).astype(self.dtype, copy=False))
        if self.layout == "fixed":
            return pa.FixedSizeListArray.from_arrays(flat, np.size(values[0]))
        offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), flat)


@dataclass(frozen=True)
class Values:
    """A column of one shard, mapped into memory: the values of all rows end to end, and where each row begins."""

    flat: np.ndarray
    offsets: np.ndarray | None = None  # None: as many values in each row, 1 or `width`
    width: int = 1

    @classmethod
    def from_arrow(cls, array: Any) -> Values:
        """Wrap an Arrow array without a copy."""
        import pyarrow as pa

        if isinstance(array, pa.FixedSizeListArray):
            return cls(array.values.to_numpy(), width=array.type.list_size)
        if isinstance(array, pa.ListArray):
            return cls(array.values.to_numpy(), array.offsets.to_numpy())
        return cls(array.to_numpy())

    def __getitem__(self, row: int) -> np.ndarray:
        """Return a row's values, [its length], read-only and without a copy."""
        if self.offsets is not None:
            return self.flat[self.offsets[row] : self.offsets[row + 1]]
        return self.flat[row * self.width : (row + 1) * self.width]

"""The ranks of one run and the few things that they tell each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Where this process stands among the ranks. With one rank nothing is sent."""

    rank: int
    world: int
    device: torch.device

    def sum_integers(self, *values: int) -> list[int]:
        """Add 64-bit integers over the ranks, modulo 2**64 (as signed values)."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return [int(v) for v in tensor.tolist()]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's rows, [n, ...] with an n of its own, in the order of the ranks."""
        if self.world == 1:
            return [rows]
        counts = self.sum_integers(*(len(rows) if rank == self.rank else 0 for rank in range(self.world)))
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return [found[:count] for found, count in zip(gathered, counts, strict=True)]

    def gather(self, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return every rank's arrays, in the order of the ranks."""
        if self.world == 1:
            return [arrays]
        gathered: list[dict[str, np.ndarray]] = [{} for _ in range(self.world)]
        dist.all_gather_object(gathered, arrays)
        return gathered

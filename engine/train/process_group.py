"""The ranks of one run and the collectives that the training loop needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ProcessGroup:
    """This process's rank in the default process group of torch.distributed. With one rank no collective runs."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce_ints(self, *values: int) -> list[int]:
        """Sum 64-bit integers over the ranks, modulo 2**64 (as signed values)."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return [int(v) for v in tensor.tolist()]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def all_gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's rows [n, ...], in rank order; n may differ between ranks."""
        if self.world_size == 1:
            return [rows]
        counts = self.all_reduce_ints(*(len(rows) if rank == self.rank else 0 for rank in range(self.world_size)))
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return [rank_rows[:count] for rank_rows, count in zip(gathered, counts, strict=True)]

    def all_gather_arrays(self, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return every rank's named arrays, in rank order."""
        if self.world_size == 1:
            return [arrays]
        gathered: list[dict[str, np.ndarray]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(gathered, arrays)
        return gathered

"""The collectives of a process group, on one rank and on several."""

from __future__ import annotations

import numpy as np
import torch

from engine.train.process_group import ProcessGroup
from tests.engine.train.ranks import on_ranks

CPU = torch.device("cpu")


def test_one_rank_needs_no_process_group() -> None:
    group, rows, arrays = ProcessGroup(0, 1, CPU), torch.ones(2, 3), {"a": np.ones(2)}
    assert group.all_reduce_ints(3, 4) == [3, 4]
    assert group.all_reduce(rows) is rows
    assert group.all_gather_rows(rows) == [rows]
    assert group.all_gather_arrays(arrays) == [arrays]
    group.barrier()


def check_collectives(rank: int, world_size: int) -> None:
    """Check the results of the collectives on one of three ranks."""
    group = ProcessGroup(rank, world_size, CPU)
    assert group.all_reduce_ints(rank, 2**62) == [3, 3 * 2**62 - 2**64]  # modulo 2**64, as a signed value
    assert group.all_reduce(torch.tensor([float(rank)])).tolist() == [3.0]
    rows = group.all_gather_rows(torch.full((rank, 2), float(rank)))
    assert [part.tolist() for part in rows] == [[], [[1.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]]
    gathered = group.all_gather_arrays({"rank": np.array(rank)} if rank else {})
    assert [{name: int(value) for name, value in arrays.items()} for arrays in gathered] == [
        {},
        {"rank": 1},
        {"rank": 2},
    ]
    group.barrier()


def test_collectives_of_three_ranks() -> None:
    on_ranks(check_collectives, 3)

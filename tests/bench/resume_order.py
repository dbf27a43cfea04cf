"""Seconds from opening the data to the first batch at 90 % of an epoch, against skipping the batches before it.

The same prepared blocks of 100 MB of Python source, shuffled, 32 x 256 tokens per batch. A resumed loop over a torch DataLoader
skips the batches before, and so does `skip` of a streamed, shuffled dataset. Predicted: hundreds of times faster, as the peers
read 90 % of the data.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.environment import set_default_environment
from engine.config import Config, with_values
from engine.data.order import DataOrder
from engine.data.packing import Blocks, Packing, pack
from engine.data.prepare import prepare
from engine.data.shards import Split
from tests.bench.interleaved import interleave, show
from tests.bench.tokenize import write_corpus

LENGTH, BATCH, RESUME_AT = 256, 32, 0.9


def collate(samples: list[dict[str, Any]]) -> torch.Tensor:
    """Stack a batch."""
    return torch.stack([torch.as_tensor(np.asarray(sample["tokens"])) for sample in samples])


def ours(folder: Path) -> float:
    """Return the seconds to open the data and to read the samples of that step."""
    start = time.perf_counter()
    samples = pack(Split.open(folder, "train"), LENGTH, Packing(), overlap=1)
    order = DataOrder(len(samples), BATCH, seed=0)
    batch = collate([samples[i] for i in order.sample_ids(int(RESUME_AT * len(samples) / BATCH))])
    assert batch.shape == (BATCH, LENGTH + 1)
    return time.perf_counter() - start


def data_loader(folder: Path) -> float:
    """Return the seconds of a DataLoader that is iterated to that batch."""
    start = time.perf_counter()
    samples = Blocks(Split.open(folder, "train"), LENGTH)
    generator = torch.Generator().manual_seed(0)
    batches = torch.utils.data.DataLoader(samples, BATCH, shuffle=True, generator=generator, collate_fn=collate)  # type: ignore[arg-type]
    batch = next(islice(batches, int(RESUME_AT * len(samples) / BATCH), None))
    assert batch.shape == (BATCH, LENGTH + 1)
    return time.perf_counter() - start


def streamed_dataset(rows: Path) -> float:
    """Return the seconds of a streamed dataset that skips to that batch."""
    import datasets

    start = time.perf_counter()
    loaded = datasets.load_from_disk(rows)
    skipped = int(RESUME_AT * len(loaded) / BATCH) * BATCH
    batches = loaded.to_iterable_dataset(num_shards=8).shuffle(seed=0, buffer_size=1000).skip(skipped)
    batch = collate(list(islice(batches, BATCH)))
    assert batch.shape == (BATCH, LENGTH + 1)
    return time.perf_counter() - start


def write_dataset(folder: Path, rows: Path) -> None:
    """Write the same blocks as a dataset on disk."""
    import datasets

    blocks = Blocks(Split.open(folder, "train"), LENGTH)

    def examples() -> Iterator[dict[str, Any]]:
        for i in range(len(blocks)):
            yield blocks[i]

    datasets.disable_progress_bars()
    datasets.Dataset.from_generator(examples, cache_dir=str(rows.parent / "cache")).save_to_disk(rows)


def main() -> None:
    """Print the ratios of the peers' seconds to ours."""
    set_default_environment()
    with tempfile.TemporaryDirectory() as scratch:
        write_corpus(Path(scratch) / "in", megabytes=100, files=1)
        config = with_values(Config(), {"runs_dir": f"{scratch}/runs", "data.path": f"{scratch}/in"})
        folder, rows = prepare(config), Path(scratch) / "rows"
        write_dataset(folder, rows)
        print(f"{len(Blocks(Split.open(folder, 'train'), LENGTH)):,} samples")
        milliseconds = interleave(
            {
                "order": lambda: 1e3 * ours(folder),
                "torch DataLoader": lambda: 1e3 * data_loader(folder),
                "datasets, streamed": lambda: 1e3 * streamed_dataset(rows),
            }
        )
        for peer in ("torch DataLoader", "datasets, streamed"):
            show({name: milliseconds[name] for name in (peer, "order")}, "ms", peer, {"order": 100})


if __name__ == "__main__":
    main()

"""Turn raw text into token shards, a tokenizer and a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start


def prepare(config: Config) -> None:
    """Prepare the data, and say where it is and what is in it."""
    from engine.data.manifest import Manifest
    from engine.progress import console
    from engine.train.launch import prepare_data

    folder = prepare_data(config)
    manifest = Manifest.load(folder)
    for name, split in manifest.splits.items():
        console.print(f"{name:<11} {split['documents']:>9,} documents {split['tokens']:>13,} tokens")
    for reason, count in manifest.skipped.items():
        console.print(f"left out    {count:>9,} {reason}")
    if manifest.labels:
        console.print(f"labels      {', '.join(manifest.labels[:20])}")
    console.print(f"hash        {manifest.hash}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("prepare", prepare, argv)


if __name__ == "__main__":
    sys.exit(main())

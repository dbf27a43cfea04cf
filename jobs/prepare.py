"""Turn raw text into token shards, a tokenizer and a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start


def prepare(config: Config) -> None:
    """Prepare the data (with bundle=..., by that bundle's tokenizer), and say where it is and what is in it."""
    from pathlib import Path

    from engine.bundles.find import find_bundle
    from engine.data.manifest import Manifest
    from engine.progress import console
    from engine.train.launch import prepare_data

    start = find_bundle(config.bundle, Path(config.runs_dir), config.tracking_uri) if config.bundle else None
    folder = prepare_data(config, start)
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

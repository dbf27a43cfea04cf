"""Turn raw text into token shards, a tokenizer and a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from engine.config import Config
from jobs.entry import ray_session, start


def prepare(config: Config) -> None:
    """Prepare the data (with bundle=..., by that bundle's tokenizer), and say where it is and what is in it."""
    from engine.data.corpus import check_input

    check_input(config.data)  # a mistake is told before all that is imported below
    from pathlib import Path

    from engine.bundles.find import find_bundle
    from engine.data.manifest import Manifest
    from engine.data.packing import Packing, pack
    from engine.data.shards import Split
    from engine.progress import console
    from engine.train.launch import packed, prepare_data

    start = find_bundle(config.bundle, Path(config.runs_dir), config.tracking_uri) if config.bundle else None
    with ray_session(config) if config.cluster.address != "local" else nullcontext():
        folder = prepare_data(config, start)
    manifest = Manifest.load(folder)
    for name, split in manifest.splits.items():
        console.print(f"{name:<11} {split['documents']:>9,} documents {split['tokens']:>13,} tokens")
    for name, origin in manifest.origins.items() if len(manifest.origins) > 1 else ():
        documents, tokens = sum(origin["documents"].values()), sum(origin["tokens"].values())
        console.print(f"  {name:<9} {documents:>9,} documents {tokens:>13,} tokens, license {origin['license']}")
    for reason, count in manifest.skipped.items():
        console.print(f"left out    {count:>9,} {reason}")
    for kind, count in manifest.masked.items():
        console.print(f"masked      {count:>9,} {kind}")
    if config.data.packing != "end_to_end":
        overlap = int(config.objective.name != "masked_lm")  # the next token of a sample's last one is a target too
        samples = pack(Split.open(folder, "train"), config.data.sequence_length, Packing.of(config.data), overlap)
        console.print(packed(samples, config))
    if manifest.labels:
        console.print(f"labels      {', '.join(manifest.labels[:20])}")
    console.print(f"hash        {manifest.hash}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("prepare", prepare, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Prepare raw data: token shards, a tokenizer and a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from engine.config import Config
from jobs.entry import ray_session, run_job


def prepare(config: Config) -> None:
    """Prepare the data (with bundle=..., with that bundle's tokenizer), and print their location and contents."""
    from engine.data.corpus import check_input

    check_input(config.data)  # before the slow imports, so that a mistake is reported at once
    from pathlib import Path

    from engine.bundles.find import find_bundle
    from engine.data.manifest import Manifest
    from engine.data.packing import Packing, pack
    from engine.data.shards import Split
    from engine.objectives.contract import objective_class
    from engine.progress import console
    from engine.train.launch import packing_summary, prepare_data

    start_bundle = find_bundle(config.bundle, Path(config.runs_dir), config.tracking_uri) if config.bundle else None
    with ray_session(config) if config.cluster.address != "local" else nullcontext():
        folder = prepare_data(config, start_bundle)
    manifest = Manifest.load(folder)
    for name, split in manifest.splits.items():
        console.print(f"{name:<11} {split['documents']:>9,} documents {split['tokens']:>13,} tokens")
    for name, source in manifest.origins.items() if len(manifest.origins) > 1 else ():
        documents, tokens = sum(source["documents"].values()), sum(source["tokens"].values())
        console.print(f"  {name:<9} {documents:>9,} documents {tokens:>13,} tokens, license {source['license']}")
    for reason, count in manifest.skipped.items():
        console.print(f"left out    {count:>9,} {reason}")
    for kind, count in manifest.masked.items():
        console.print(f"masked      {count:>9,} {kind}")
    if config.data.packing != "end_to_end":
        overlap = int(
            objective_class(config.objective.name).is_causal
        )  # the target of a sample's last token is the next token
        samples = pack(
            Split.open(folder, "train"), config.data.sequence_length, Packing.from_config(config.data), overlap
        )
        console.print(packing_summary(samples, config))
    if manifest.labels:
        console.print(f"labels      {', '.join(manifest.labels[:20])}")
    console.print(f"hash        {manifest.hash}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `manta prepare`."""
    return run_job("prepare", prepare, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Write the manifest of a prepared folder, from what the two passes over the corpus found."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config, source_configs
from engine.data.document import SPLITS, Part
from engine.data.manifest import PROCESSOR_FOLDER, SOURCES_FILE, Manifest, hash_folder
from engine.data.part_tokenizer import ShardFacts
from engine.data.python_stdlib import LICENSE
from engine.data.scan import DROPPED, Scan, Selection
from engine.data.tokenizer import SpecialTokens
from engine.hashing import sha256_file


def write_manifest(
    config: Config, corpus: Sequence[Part], scans: Sequence[Scan], selection: Selection,
    shards: Sequence[ShardFacts], special: SpecialTokens, folder: Path,
) -> None:  # fmt: skip
    """Write manifest.json and the list of input files."""
    kind, names = corpus[0].kind, list(source_configs(config.data))
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        of_split = [shard | {"source": part.source} for part, facts in zip(corpus, shards) for shard in facts[split]]
        if of_split:
            of_split.sort(
                key=lambda shard: names.index(shard["source"])
            )  # stable: the shards of a source stay together
            splits[split] = {
                "documents": sum(shard["rows"] for shard in of_split),
                "tokens": sum(shard["tokens"] for shard in of_split),
                "shards": of_split,
            }
    by_file = _facts_by_file(corpus, scans, selection)
    origins = {}
    for name, own in source_configs(config.data).items():
        files = [file for (source, _), file in by_file.items() if source == name]
        masked = sum((scan.masked for part, scan in zip(corpus, scans) if part.source == name), Counter[str]())
        skipped = sorted(selection.skipped.get(name, Counter()).items())
        origins[name] = {
            "license": LICENSE if own.source.startswith("python_") and own.license == "not stated" else own.license,
            "files": len(files),
            "bytes": sum(file["bytes"] for file in files),
            "documents": _sum_by_split(splits, name, "rows"),
            "tokens": _sum_by_split(splits, name, "tokens"),
            "skipped": {reason: count for reason, count in skipped if count},
            "masked": dict(sorted(masked.items())),
        }
    processor, tokenizer = folder / PROCESSOR_FOLDER, folder / "tokenizer" / "tokenizer.json"
    Manifest(
        name=config.data.name,
        kind=kind.name,
        sources=_write_sources(folder, by_file),
        origins=origins,
        tokenizer=hash_folder(processor) if kind.has_preprocessor else sha256_file(tokenizer),
        vocab_size=special.vocab_size,
        eos_id=special.eos_id,
        pad_id=special.pad_id,
        closing_tokens=len(special.closing) if kind.uses_tokenizer_template else 0,
        labels=selection.labels,
        splits=splits,
        config=dataclasses.asdict(config.data),
        seed=config.seed,
        **kind.manifest_fields(processor),
    ).save(folder)


def _sum_by_split(splits: dict[str, dict[str, Any]], source: str, key: str) -> dict[str, int]:
    """Return the total of one figure of a source's shards, by split."""
    return {
        split: sum(shard[key] for shard in facts["shards"] if shard["source"] == source)
        for split, facts in splits.items()
    }


def _facts_by_file(
    corpus: Sequence[Part], scans: Sequence[Scan], selection: Selection
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return, by (source, path), the facts of each file that gave documents: path, sha256, bytes, documents by split."""
    by_file: dict[tuple[str, str], dict[str, Any]] = {}
    for part, scan, splits in zip(corpus, scans, selection.splits):
        for i, file in enumerate(scan.files):
            facts = by_file.setdefault((part.source, file["path"]), {"source": part.source, "documents": Counter()})
            facts |= file
            counts = np.bincount(splits[scan.origins == i], minlength=DROPPED + 1)[:DROPPED]
            facts["documents"] += Counter({split: int(n) for split, n in zip(SPLITS, counts) if n})
    return {key: facts for key, facts in by_file.items() if facts["documents"]}


def _write_sources(folder: Path, by_file: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Write one line for each input file that gave documents, and return their summary."""
    path = folder / SOURCES_FILE
    with path.open("w", encoding="utf-8", errors="backslashreplace") as out:  # a file's name may be no UTF-8
        for facts in by_file.values():
            out.write(json.dumps(facts, ensure_ascii=False, sort_keys=True) + "\n")
    size = sum(facts["bytes"] for facts in by_file.values())
    return {"file": path.name, "files": len(by_file), "bytes": size, "sha256": sha256_file(path)}

"""The manifest of a prepared folder, from what the two passes over the corpus found."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config, data_kind, source_configs
from engine.data.corpus import SPLITS, Part
from engine.data.manifest import PROCESSOR, SOURCES, Manifest, hash_of, sha256
from engine.data.processor import load_feature_extractor, load_image_processor, side_of
from engine.data.scan import DROPPED, Scan, Selection
from engine.data.stdlib import LICENSE
from engine.data.tokenizer import Specials
from engine.data.tokenizing import Shards


def write_manifest(
    config: Config, corpus: Sequence[Part], surveys: Sequence[Scan], kept: Selection,
    shards: Sequence[Shards], special: Specials, folder: Path, labelled: bool,
) -> None:  # fmt: skip
    """Write manifest.json and the list of input files."""
    images, speech = config.data.image_column is not None, config.data.audio_column is not None
    names = list(source_configs(config.data))
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        mine = [shard | {"source": part.source} for part, facts in zip(corpus, shards) for shard in facts[split]]
        if mine:
            mine.sort(key=lambda shard: names.index(shard["source"]))  # stable: each source's lie together
            splits[split] = {
                "documents": sum(shard["rows"] for shard in mine),
                "tokens": sum(shard["tokens"] for shard in mine),
                "shards": mine,
            }
    by_file = _by_file(corpus, surveys, kept)
    origins = {}
    for name, own in source_configs(config.data).items():
        files = [file for (source, _), file in by_file.items() if source == name]
        masked = sum((known.masked for part, known in zip(corpus, surveys) if part.source == name), Counter[str]())
        origins[name] = {
            "license": LICENSE if own.source.startswith("python_") and own.license == "not stated" else own.license,
            "files": len(files),
            "bytes": sum(file["bytes"] for file in files),
            "documents": {
                split: sum(s["rows"] for s in facts["shards"] if s["source"] == name) for split, facts in splits.items()
            },
            "tokens": {
                split: sum(s["tokens"] for s in facts["shards"] if s["source"] == name)
                for split, facts in splits.items()
            },
            "skipped": {reason: count for reason, count in sorted(kept.skipped.get(name, Counter()).items()) if count},
            "masked": dict(sorted(masked.items())),
        }
    Manifest(
        name=config.data.name,
        kind=data_kind(config.data),
        sources=_write_sources(folder, by_file),
        origins=origins,
        tokenizer=hash_of(folder / PROCESSOR) if images or speech else sha256(folder / "tokenizer" / "tokenizer.json"),
        vocab_size=special.vocab_size,
        eos_id=special.eos_id,
        pad_id=special.pad_id,
        closing_tokens=len(special.closing) if labelled or images else 0,
        labels=kept.labels,
        splits=splits,
        config=dataclasses.asdict(config.data),
        seed=config.seed,
        image_size=side_of(load_image_processor(str(folder / PROCESSOR))) or 0 if images else 0,
        sampling_rate=load_feature_extractor(str(folder / PROCESSOR)).sampling_rate if speech else 0,
    ).save(folder)


def _by_file(corpus: Sequence[Part], surveys: Sequence[Scan], kept: Selection) -> dict[tuple[str, str], dict[str, Any]]:
    """Return, by (source, path), the facts of each file that gave documents: path, sha256, bytes, documents by split."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part, known, one in zip(corpus, surveys, kept.splits):
        for i, file in enumerate(known.files):
            facts = found.setdefault((part.source, file["path"]), {"source": part.source, "documents": Counter()})
            facts |= file
            counts = np.bincount(one[known.origins == i], minlength=DROPPED + 1)[:DROPPED]
            facts["documents"] += Counter({split: int(n) for split, n in zip(SPLITS, counts) if n})
    return {key: facts for key, facts in found.items() if facts["documents"]}


def _write_sources(folder: Path, by_file: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Write one line an input file that gave documents, and return their summary."""
    path = folder / SOURCES
    with path.open("w", encoding="utf-8", errors="backslashreplace") as out:  # a file's name may be no UTF-8
        for facts in by_file.values():
            out.write(json.dumps(facts, ensure_ascii=False, sort_keys=True) + "\n")
    size = sum(facts["bytes"] for facts in by_file.values())
    return {"file": path.name, "files": len(by_file), "bytes": size, "sha256": sha256(path)}

"""The manifest of a prepared folder: what it holds and where that came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.hashing import sha256_file

MANIFEST_FILE, SOURCES_FILE = "manifest.json", "sources.jsonl"
REMOTE_FILE = "store.json"  # address of the shards in a store; they are fetched when they are first read
TOKENIZER_FOLDER, PROCESSOR_FOLDER = "tokenizer", "processor"  # of text; of images or sounds


@dataclass(frozen=True)
class Manifest:
    """The facts of one prepared folder, read from and written to its manifest.json."""

    name: str
    kind: str  # name of a `DataKind`
    sources: dict[
        str, Any
    ]  # summary of sources.jsonl, which has one line for each input file: file, files, bytes, sha256
    origins: dict[str, dict[str, Any]]  # source -> {license, files, bytes, documents, tokens, skipped, masked}
    tokenizer: str  # SHA-256 of tokenizer/tokenizer.json; for images or sounds, of the files in processor/
    vocab_size: int
    eos_id: int
    pad_id: int
    closing_tokens: int  # special tokens that the tokenizer ends each row with (BERT's [SEP]: 1); 0 for text in blocks
    labels: list[str]  # sorted; shards hold indices of it
    # split -> {"shards": [{file, source, rows, tokens, bytes, sha256}], "documents", "tokens"}
    splits: dict[str, dict[str, Any]]
    config: dict[str, Any]  # the DataConfig
    seed: int
    image_size: int = 0  # side of an image in pixels; 0: no images
    sampling_rate: int = 0  # of the sounds, in Hz; 0: no sounds
    hash: str = field(default="")  # SHA-256 over the shards' hashes, the tokenizer's and the labels

    def __post_init__(self) -> None:
        if not self.hash:
            object.__setattr__(self, "hash", self.content_hash())

    @property
    def skipped(self) -> dict[str, int]:
        """Documents left out of all sources, by reason."""
        return dict(sum((Counter(origin["skipped"]) for origin in self.origins.values()), Counter[str]()))

    @property
    def masked(self) -> dict[str, int]:
        """Spans masked in all sources, by kind."""
        return dict(sum((Counter(origin["masked"]) for origin in self.origins.values()), Counter[str]()))

    @property
    def license(self) -> str:
        """The licenses of all sources."""
        return ", ".join(sorted({origin["license"] for origin in self.origins.values()}))

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of all that a training run sees: shards, tokenizer, labels."""
        shards = {name: [shard["sha256"] for shard in split["shards"]] for name, split in sorted(self.splits.items())}
        content: dict[str, Any] = {"shards": shards, "tokenizer": self.tokenizer, "labels": self.labels}
        if len(self.origins) > 1:
            content["origins"] = [(shard["source"], shard["sha256"]) for shard in self.shards()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it as manifest.json."""
        (folder / MANIFEST_FILE).write_text(
            json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8"
        )

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """Read it and check that each shard has its full size, or is in a store.

        Raises UserError that names the first shard that hasn't.
        """
        folder = Path(folder)
        if not (folder / MANIFEST_FILE).is_file():
            raise UserError(f"{folder} holds no prepared data (no {MANIFEST_FILE}): make it with `manta prepare`")
        try:
            content = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
            for source in content["origins"].values():
                if "licence" in source:  # the key's former spelling
                    source["license"] = source.pop("licence")
            manifest = cls(**content)
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{folder / MANIFEST_FILE} is damaged: delete {folder} and run `manta prepare` again"
            ) from error
        for shard in manifest.shards():
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"] and not (size is None and (folder / REMOTE_FILE).exists()):
                problem = "missing" if size is None else f"{size:,} bytes long, not {shard['bytes']:,}"
                raise UserError(f"{path} is {problem}: delete {folder} and run `manta prepare` again")
        return manifest

    def shards(self) -> list[dict[str, Any]]:
        """Return the shards of all splits."""
        return [shard for split in self.splits.values() for shard in split["shards"]]

    def read_sources(self, folder: Path) -> list[dict[str, Any]]:
        """Return the facts of each input file: source, path, sha256, bytes, documents by split."""
        return [json.loads(line) for line in (folder / self.sources["file"]).read_text("utf-8").splitlines()]


def hash_folder(folder: Path) -> str:
    """Return the SHA-256 (hex) of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\x1f{sha256_file(path)}\n".encode())
    return digest.hexdigest()

"""What a prepared folder holds and where it came from: counts, hashes, tokenizer, labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError

FILE, SOURCES = "manifest.json", "sources.jsonl"
ORIGIN = "store.json"  # where a store has the shards: its address; they are fetched when they are first read
TOKENIZER, PROCESSOR = "tokenizer", "processor"  # folders, the one of text and the other of images or sounds


@dataclass(frozen=True)
class Manifest:
    """The facts of one prepared folder, read from and written to its manifest.json."""

    name: str
    kind: str  # what `data_kind` of engine/config calls it
    sources: dict[
        str, Any
    ]  # {"file": "sources.jsonl", "files", "bytes", "sha256"}; one line an input file in that file
    origins: dict[str, dict[str, Any]]  # source -> {license, files, bytes, documents, tokens, skipped, masked}
    tokenizer: str  # SHA-256 of tokenizer/tokenizer.json; of images or sounds, that of the files in processor/
    vocab_size: int
    eos_id: int
    pad_id: int
    closing_tokens: int  # special tokens that end each row of labelled data (BERT's [SEP]: 1)
    labels: list[str]  # sorted; a row's label is an index of it
    splits: dict[
        str, dict[str, Any]
    ]  # split -> {"shards": [{file, source, rows, tokens, bytes, sha256}], "documents", "tokens"}
    config: dict[str, Any]  # the DataConfig
    seed: int
    image_size: int = 0  # side of an image in pixels; 0: there are none
    sampling_rate: int = 0  # samples a second of the sounds; 0: there are none
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
        """Places masked in all sources, by kind."""
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
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """Read it and check that each shard is there in its full size, or in a store.

        Raises UserError that names the first that isn't.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} holds no prepared data (no {FILE}): make it with `manta prepare`")
        try:
            manifest = cls(**json.loads((folder / FILE).read_text("utf-8")))
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / FILE} is damaged: delete {folder} and run `manta prepare` again") from error
        for shard in manifest.shards():
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"] and not (size is None and (folder / ORIGIN).exists()):
                found = "missing" if size is None else f"{size:,} bytes long, not {shard['bytes']:,}"
                raise UserError(f"{path} is {found}: delete {folder} and run `manta prepare` again")
        return manifest

    def shards(self) -> list[dict[str, Any]]:
        """Return the shards of all splits."""
        return [shard for split in self.splits.values() for shard in split["shards"]]

    def read_sources(self, folder: Path) -> list[dict[str, Any]]:
        """Return each input file: source, path, sha256, bytes, documents by split."""
        return [json.loads(line) for line in (folder / self.sources["file"]).read_text("utf-8").splitlines()]


def verify(folder: Path | str) -> Manifest:
    """Check every hash of a prepared folder. Raises UserError that names the first file that was changed."""
    from engine.data.remote_store import at_hand

    folder = Path(folder)
    manifest = Manifest.load(folder)
    for shard in manifest.shards():
        at_hand(folder, shard["file"])
    expected = {shard["file"]: shard["sha256"] for shard in manifest.shards()}
    expected |= {SOURCES: manifest.sources["sha256"]}
    if manifest.image_size or manifest.sampling_rate:
        found = hash_of(folder / PROCESSOR) if (folder / PROCESSOR).is_dir() else ""
        if found != manifest.tokenizer:
            raise UserError(
                f"{folder / PROCESSOR} was changed since it was prepared: delete {folder} and run `manta prepare` again"
            )
    else:
        expected["tokenizer/tokenizer.json"] = manifest.tokenizer
    for name, digest in expected.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name} was changed since it was prepared: delete {folder} and run `manta prepare` again"
            )
    if manifest.hash != manifest.content_hash():
        raise UserError(
            f"{folder / FILE} was changed since it was prepared: delete {folder} and run `manta prepare` again"
        )
    return manifest


def hash_of(folder: Path) -> str:
    """Return the SHA-256 (hex) of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\x1f{sha256(path)}\n".encode())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

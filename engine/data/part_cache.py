"""What each part of an unfinished folder gave so far, so that the same command goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import BadZipFile

from engine.atomic_write import write_atomically
from engine.data.document import Part
from engine.data.part_tokenizer import ShardFacts
from engine.data.scan import Scan
from engine.hashing import sha256_file


class PartCache:
    """The scans and shards of parts in one folder; each is complete or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_scan(self, part: Part) -> Scan | None:
        """Return a part's scan, if it is there and not damaged."""
        try:
            return Scan.from_bytes(self._scan_file(part).read_bytes())
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def put_scan(self, part: Part, scan: Scan) -> None:
        """Keep a part's scan."""
        write_atomically(self._scan_file(part), scan.to_bytes())

    def get_shards(self, part: Part) -> ShardFacts | None:
        """Return the facts of a part's shards, if all of them are there, unchanged."""
        try:
            facts: ShardFacts = json.loads(self._shards_file(part).read_text())
            shards = [shard for split in facts.values() for shard in split]
            unchanged = all(sha256_file(self.folder / shard["file"]) == shard["sha256"] for shard in shards)
            return facts if unchanged else None
        except (OSError, ValueError):
            return None

    def put_shards(self, part: Part, facts: ShardFacts) -> None:
        """Keep the facts of a part's shards, which are written already."""
        write_atomically(self._shards_file(part), json.dumps(facts).encode())

    def clear(self) -> None:
        """Delete everything but the shards."""
        for file in (*self.folder.glob("survey-*"), *self.folder.glob("part-*")):
            file.unlink()

    def _scan_file(self, part: Part) -> Path:
        return self.folder / f"survey-{part.number:05d}.npz"

    def _shards_file(self, part: Part) -> Path:
        return self.folder / f"part-{part.number:05d}.json"

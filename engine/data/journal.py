"""What the parts of an unfinished folder gave so far, kept there so that the same command goes on after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from zipfile import BadZipFile

from engine.data.corpus import Part
from engine.data.manifest import sha256
from engine.data.scan import Scan
from engine.data.tokenizing import Shards


class Journal:
    """The surveys and shards of parts in one folder; each is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def survey(self, part: Part) -> Scan | None:
        """Return what a part's survey found, if it is there and not damaged."""
        try:
            return Scan.from_bytes(self._survey_file(part).read_bytes())
        except (OSError, ValueError, EOFError, BadZipFile):
            return None

    def keep_survey(self, part: Part, found: Scan) -> None:
        """Keep a part's survey."""
        _put(self._survey_file(part), found.to_bytes())

    def shards(self, part: Part) -> Shards | None:
        """Return the facts of a part's shards, if all of them are there, unchanged."""
        try:
            facts: Shards = json.loads(self._shards_file(part).read_text())
            shards = [shard for split in facts.values() for shard in split]
            return facts if all(sha256(self.folder / shard["file"]) == shard["sha256"] for shard in shards) else None
        except (OSError, ValueError):
            return None

    def keep_shards(self, part: Part, facts: Shards) -> None:
        """Keep the facts of a part's shards, which are written already."""
        _put(self._shards_file(part), json.dumps(facts).encode())

    def close(self) -> None:
        """Leave nothing but the shards."""
        for file in (*self.folder.glob("survey-*"), *self.folder.glob("part-*")):
            file.unlink()

    def _survey_file(self, part: Part) -> Path:
        return self.folder / f"survey-{part.number:05d}.npz"

    def _shards_file(self, part: Part) -> Path:
        return self.folder / f"part-{part.number:05d}.json"


def _put(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)

"""A copy of a run in a store (train.mirror): made beside the training, and taken back where the run's folder is gone.

<mirror>/<name>/ has the run's config.yaml, metrics.jsonl, status.json, checkpoints and bundle. Of a checkpoint and of a
bundle the manifest goes last, so that what has one is whole; checkpoints have their own checksums beside.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.data.filesystems import open_address, put_file, store_errors
from engine.errors import UserError
from engine.train.run_folder import RunFolder

EVERY_S = 2.0  # between looks for a new checkpoint
CHECKPOINTS = "step-*/manifest.json"
MANIFESTS = ("manifest.json", "manta.json")  # of a checkpoint, of a bundle
STATUS, FACTS = "status.json", ("config.yaml", "metrics.jsonl")


class Mirror:
    """Copies a run as it goes on, from a thread of the driver's; `say` hears of what could not be copied."""

    def __init__(self, run: RunFolder, config: Config, say: Callable[[str], None]) -> None:
        """Raise UserError where the store cannot be reached."""
        assert config.train.mirror
        self._run, self._say, self._said = run, say, ""
        self._address = f"{config.train.mirror.rstrip('/')}/{config.name}"
        self._there, self._place = _open(config.train.mirror, config.name)
        with store_errors(f"train.mirror={config.train.mirror}", self._there):
            found = [path for path in _files(self._there, f"{self._place}/checkpoints") if path.endswith(MANIFESTS)]
            self._copied = {path.rsplit("/", 2)[-2]: _digest(self._there.cat_file(path)) for path in found}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        """Begin to follow the run."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Copy what is left."""
        self._stop.set()
        self._thread.join()
        self._try(self._finish)

    def _follow(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._try(self._copy_checkpoints)

    def _try(self, copy: Callable[[], None]) -> None:
        try:
            with store_errors(f"the mirror {self._address}", self._there, "written"):
                copy()
        except (UserError, OSError) as error:
            if str(error) != self._said:  # once, not at each try
                self._said = str(error)
                self._say(f"{error}; it is tried again")

    def _copy_checkpoints(self) -> None:
        here = {path.parent: _digest(path.read_bytes()) for path in sorted(self._run.checkpoints.glob(CHECKPOINTS))}
        for folder, digest in here.items():
            if self._copied.get(folder.name) != digest and self._put_folder(folder):
                self._copied[folder.name] = digest
        for name in (
            set(self._copied) - {folder.name for folder in here} if here else ()
        ):  # the run keeps them no longer
            place = f"{self._place}/checkpoints/{name}"
            self._there.rm_file(f"{place}/{MANIFESTS[0]}")
            self._there.rm(place, recursive=True)
            del self._copied[name]

    def _finish(self) -> None:
        self._copy_checkpoints()
        if self._run.bundle.exists():
            self._put_folder(self._run.bundle)
        self._put_facts(*FACTS, STATUS)  # not before the end: a run that is under way goes on anywhere

    def _put_folder(self, folder: Path) -> bool:
        """Copy a folder with a manifest; say False where the run has removed it meanwhile."""
        self._put_facts(*FACTS)
        try:
            for name in MANIFESTS:
                if self._there.exists(f"{self._place}/{folder.relative_to(self._run.path)}/{name}"):
                    self._there.rm_file(f"{self._place}/{folder.relative_to(self._run.path)}/{name}")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name in MANIFESTS):
                self._put(path)
        except FileNotFoundError:
            if folder.exists():
                raise
            return False
        return True

    def _put_facts(self, *names: str) -> None:
        for name in names:
            if (self._run.path / name).exists():
                self._put(self._run.path / name)

    def _put(self, path: Path) -> None:
        put_file(self._there, path, f"{self._place}/{path.relative_to(self._run.path).as_posix()}")


def take_back(config: Config) -> bool:
    """Fetch a run from its mirror where its own folder has no checkpoint; say whether there was anything to fetch.

    Raises UserError where the store cannot be reached.
    """
    run = RunFolder(config.run_dir)
    if not config.train.mirror or any(run.checkpoints.glob(CHECKPOINTS)):
        return False
    there, place = _open(config.train.mirror, config.name)
    with store_errors(f"train.mirror={config.train.mirror}", there):
        files = [path.removeprefix(place).lstrip("/") for path in _files(there, place)]
        whole = {name.rpartition("/")[0] for name in files if name.endswith(MANIFESTS)}
        wanted = [
            name for name in files if name in (*FACTS, STATUS) or any(name.startswith(f"{folder}/") for folder in whole)
        ]
        if not any(folder.startswith("checkpoints/") for folder in whole):
            return False
        for name in sorted(wanted, key=lambda name: name.endswith(MANIFESTS)):
            target = run.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            there.get_file(f"{place}/{name}", str(target))
    return True


def _open(mirror: str, name: str) -> tuple[Any, str]:
    base = mirror.rstrip("/") if "://" in mirror else str(Path(mirror).absolute())
    there, place = open_address(f"train.mirror={mirror}", f"{base}/{name}")
    return there, place


def _files(there: Any, place: str) -> list[str]:
    return sorted(there.find(place)) if there.exists(place) else []


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

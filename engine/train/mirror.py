"""Mirrors a run to remote storage (train.mirror) while it trains, and restores it from there if its folder is gone.

<mirror>/<name>/ holds the run's config.yaml, metrics.jsonl, status.json, checkpoints and bundle. The manifest of a
checkpoint or bundle is copied last, so that one with a manifest is complete; a checkpoint also has its own checksums.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.data.filesystems import put_file, remote_errors, resolve_address
from engine.errors import UserError
from engine.train.run_folder import RunFolder

POLL_S = 2.0  # between checks for a new checkpoint
CHECKPOINTS = "step-*/manifest.json"
MANIFESTS = ("manifest.json", "manta.json")  # of a checkpoint, of a bundle
STATUS, RUN_FILES = "status.json", ("config.yaml", "metrics.jsonl")


class Mirror:
    """Copies a run's files from a thread of the driver; errors are passed to `warn`."""

    def __init__(self, run: RunFolder, config: Config, warn: Callable[[str], None]) -> None:
        """Raise UserError if the storage cannot be reached."""
        assert config.train.mirror
        self._run, self._warn, self._last_error = run, warn, ""
        self._address = f"{config.train.mirror.rstrip('/')}/{config.name}"
        self._filesystem, self._root = _open(config.train.mirror, config.name)
        with remote_errors(f"train.mirror={config.train.mirror}", self._filesystem):
            manifests = [
                path for path in _files(self._filesystem, f"{self._root}/checkpoints") if path.endswith(MANIFESTS)
            ]
            self._copied = {path.rsplit("/", 2)[-2]: _digest(self._filesystem.cat_file(path)) for path in manifests}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._copy_until_stopped, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread, and copy what is left."""
        self._stop.set()
        self._thread.join()
        self._try(self._finish)

    def _copy_until_stopped(self) -> None:
        while not self._stop.wait(POLL_S):
            self._try(self._copy_checkpoints)

    def _try(self, copy: Callable[[], None]) -> None:
        try:
            with remote_errors(f"the mirror {self._address}", self._filesystem, "written"):
                copy()
        except (UserError, OSError) as error:
            if str(error) != self._last_error:  # report it once, not on every attempt
                self._last_error = str(error)
                self._warn(f"{error}; copying will be retried")

    def _copy_checkpoints(self) -> None:
        digests = {path.parent: _digest(path.read_bytes()) for path in sorted(self._run.checkpoints.glob(CHECKPOINTS))}
        for folder, digest in digests.items():
            if self._copied.get(folder.name) != digest and self._put_folder(folder):
                self._copied[folder.name] = digest
        deleted = set(self._copied) - {folder.name for folder in digests} if digests else ()
        for name in deleted:
            target = f"{self._root}/checkpoints/{name}"
            self._filesystem.rm_file(f"{target}/{MANIFESTS[0]}")
            self._filesystem.rm(target, recursive=True)
            del self._copied[name]

    def _finish(self) -> None:
        self._copy_checkpoints()
        if self._run.bundle.exists():
            self._put_folder(self._run.bundle)
        self._put_run_files(
            *RUN_FILES, STATUS
        )  # only at the end: a restored run must not look as if it were still running

    def _put_folder(self, folder: Path) -> bool:
        """Copy a folder with a manifest; return False if the run has deleted it meanwhile."""
        self._put_run_files(*RUN_FILES)
        try:
            for name in MANIFESTS:
                if self._filesystem.exists(f"{self._root}/{folder.relative_to(self._run.path)}/{name}"):
                    self._filesystem.rm_file(f"{self._root}/{folder.relative_to(self._run.path)}/{name}")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.name in MANIFESTS):
                self._put(path)
        except FileNotFoundError:
            if folder.exists():
                raise
            return False
        return True

    def _put_run_files(self, *names: str) -> None:
        for name in names:
            if (self._run.path / name).exists():
                self._put(self._run.path / name)

    def _put(self, path: Path) -> None:
        put_file(self._filesystem, path, f"{self._root}/{path.relative_to(self._run.path).as_posix()}")


def restore_from_mirror(config: Config) -> bool:
    """Fetch a run from its mirror if its own folder has no checkpoint; return whether anything was fetched.

    Raises UserError if the storage cannot be reached.
    """
    run = RunFolder(config.run_dir)
    if not config.train.mirror or any(run.checkpoints.glob(CHECKPOINTS)):
        return False
    filesystem, root = _open(config.train.mirror, config.name)
    with remote_errors(f"train.mirror={config.train.mirror}", filesystem):
        files = [path.removeprefix(root).lstrip("/") for path in _files(filesystem, root)]
        complete = {name.rpartition("/")[0] for name in files if name.endswith(MANIFESTS)}
        to_fetch = [
            name
            for name in files
            if name in (*RUN_FILES, STATUS) or any(name.startswith(f"{folder}/") for folder in complete)
        ]
        if not any(folder.startswith("checkpoints/") for folder in complete):
            return False
        for name in sorted(to_fetch, key=lambda name: name.endswith(MANIFESTS)):
            target = run.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{name}", str(target))
    return True


def _open(mirror: str, name: str) -> tuple[Any, str]:
    base = mirror.rstrip("/") if "://" in mirror else str(Path(mirror).absolute())
    filesystem, root = resolve_address(f"train.mirror={mirror}", f"{base}/{name}")
    return filesystem, root


def _files(filesystem: Any, root: str) -> list[str]:
    return sorted(filesystem.find(root)) if filesystem.exists(root) else []


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

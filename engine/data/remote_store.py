"""Prepared folders in a store (data.store): uploaded once, downloaded where they are missing, each shard on its first read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.atomic_write import atomic_file, atomic_folder
from engine.data.filesystems import put_file, remote_errors, resolve_address
from engine.data.kinds import kind_class
from engine.data.manifest import MANIFEST_FILE, PROCESSOR_FOLDER, REMOTE_FILE, SOURCES_FILE, Manifest, hash_folder
from engine.errors import UserError
from engine.hashing import sha256_file


def upload(folder: Path, store: str) -> None:
    """Upload a prepared folder to a store, under its own name, unless it is there. Raises UserError where that fails."""
    filesystem, root = resolve_address(f"data.store={store}", _address(folder, store))
    with remote_errors(f"data.store={store}", filesystem, "written"):
        if filesystem.exists(f"{root}/{MANIFEST_FILE}"):
            return
        shards = [shard["file"] for shard in Manifest.load(folder).shards()]
        others = [path for path in _others(folder, shards) if path.name not in (MANIFEST_FILE, REMOTE_FILE)]
        files = [*(local_shard(folder, shard) for shard in shards), *others, folder / MANIFEST_FILE]
        for path in files:  # the manifest last: a folder with one is complete
            put_file(filesystem, path, f"{root}/{path.relative_to(folder).as_posix()}")


def download(folder: Path, store: str) -> bool:
    """Download a prepared folder without its shards; return whether the store has it."""
    filesystem, root = resolve_address(f"data.store={store}", _address(folder, store))
    with remote_errors(f"data.store={store}", filesystem):
        if not filesystem.exists(f"{root}/{MANIFEST_FILE}"):
            return False
        facts: dict[str, Any] = json.loads(filesystem.cat_file(f"{root}/{MANIFEST_FILE}"))
        shards = {shard["file"] for split in facts["splits"].values() for shard in split["shards"]}
        with atomic_folder(folder) as part:
            for path in filesystem.find(root):
                name = path.removeprefix(root).lstrip("/")
                if name not in shards:
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    filesystem.get_file(path, str(part / name))
            (part / REMOTE_FILE).write_text(json.dumps({"address": _address(folder, store)}))
    return True


def local_shard(folder: Path, shard: str) -> Path:
    """Return a shard's file, downloaded from the folder's store where it isn't on this machine yet.

    Raises UserError where it cannot be downloaded, or differs from what was prepared.
    """
    path = folder / shard
    if path.exists() or not (folder / REMOTE_FILE).exists():
        return path
    with file_lock(folder / ".fetching.lock"):  # one of several processes downloads it
        if not path.exists():
            _download_shard(path, json.loads((folder / REMOTE_FILE).read_text())["address"])
    return path


def verify(folder: Path | str) -> Manifest:
    """Check every hash of a prepared folder. Raises UserError that names the first file that was changed."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    for shard in manifest.shards():
        local_shard(folder, shard["file"])
    expected = {shard["file"]: shard["sha256"] for shard in manifest.shards()}
    expected |= {SOURCES_FILE: manifest.sources["sha256"]}
    if kind_class(manifest.kind).has_preprocessor:
        processor = folder / PROCESSOR_FOLDER
        if not processor.is_dir() or hash_folder(processor) != manifest.tokenizer:
            raise _changed(processor, folder)
    else:
        expected["tokenizer/tokenizer.json"] = manifest.tokenizer
    for name, digest in expected.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise _changed(folder / name, folder)
    if manifest.hash != manifest.content_hash():
        raise _changed(folder / MANIFEST_FILE, folder)
    return manifest


def _changed(path: Path, folder: Path) -> UserError:
    return UserError(f"{path} was changed since it was prepared: delete {folder} and run `manta prepare` again")


def _download_shard(path: Path, address: str) -> None:
    facts = json.loads((path.parent / MANIFEST_FILE).read_text("utf-8"))
    [digest] = [s["sha256"] for split in facts["splits"].values() for s in split["shards"] if s["file"] == path.name]
    filesystem, root = resolve_address(address, f"{address}/{path.name}")
    with atomic_file(path) as part:
        with remote_errors(f"{address}/{path.name}", filesystem):
            filesystem.get_file(root, str(part))
        if sha256_file(part) != digest:
            raise UserError(
                f"{address}/{path.name} was changed since it was prepared: delete {address} and prepare again"
            )


def _address(folder: Path, store: str) -> str:
    base = store.rstrip("/") if "://" in store else str(Path(store).absolute())
    return f"{base}/{folder.name}"


def _others(folder: Path, shards: list[str]) -> list[Path]:
    """Return the files of a folder that are not shards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.relative_to(folder).as_posix() not in shards and path.name[0] != "."]


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when the process dies."""
    import fcntl

    with path.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield

"""Prepared folders in a store (data.store): put there once; fetched by whoever lacks them, each shard when it is first read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.data.manifest import FILE, ORIGIN, Manifest, sha256
from engine.data.stores import open_address, put_file, store_errors
from engine.errors import UserError


def publish(folder: Path, store: str) -> None:
    """Put a prepared folder into a store, under its own name, unless it is there. Raises UserError where that fails."""
    filesystem, place = open_address(f"data.store={store}", _address(folder, store))
    with store_errors(f"data.store={store}", filesystem, "written"):
        if filesystem.exists(f"{place}/{FILE}"):
            return
        shards = [shard["file"] for shard in Manifest.load(folder).shards()]
        others = [path for path in _others(folder, shards) if path.name not in (FILE, ORIGIN)]
        for path in [*(at_hand(folder, shard) for shard in shards), *others, folder / FILE]:  # the manifest last
            put_file(filesystem, path, f"{place}/{path.relative_to(folder).as_posix()}")


def fetch(folder: Path, store: str) -> bool:
    """Make a folder of what a store has under its name, all but the shards; say whether the store has it."""
    filesystem, place = open_address(f"data.store={store}", _address(folder, store))
    unfinished = folder.with_name(f".{folder.name}.fetched")
    with store_errors(f"data.store={store}", filesystem):
        if not filesystem.exists(f"{place}/{FILE}"):
            return False
        facts: dict[str, Any] = json.loads(filesystem.cat_file(f"{place}/{FILE}"))
        shards = {shard["file"] for split in facts["splits"].values() for shard in split["shards"]}
        shutil.rmtree(unfinished, ignore_errors=True)
        for path in filesystem.find(place):
            name = path.removeprefix(place).lstrip("/")
            if name not in shards:
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(path, str(unfinished / name))
    (unfinished / ORIGIN).write_text(json.dumps({"address": _address(folder, store)}))
    shutil.rmtree(folder, ignore_errors=True)  # one that isn't whole
    unfinished.rename(folder)
    return True


def at_hand(folder: Path, shard: str) -> Path:
    """Return a shard's file, fetched from the folder's store where it isn't here yet.

    Raises UserError where it cannot be had, or is not what was prepared.
    """
    path = folder / shard
    if path.exists() or not (folder / ORIGIN).exists():
        return path
    with locked(folder / ".fetching.lock"):  # of several processes one fetches it
        if not path.exists():
            _fetch_shard(path, json.loads((folder / ORIGIN).read_text())["address"])
    return path


def _fetch_shard(path: Path, address: str) -> None:
    facts = json.loads((path.parent / FILE).read_text("utf-8"))
    [digest] = [s["sha256"] for split in facts["splits"].values() for s in split["shards"] if s["file"] == path.name]
    unfinished = path.with_name(f".{path.name}")
    filesystem, place = open_address(address, f"{address}/{path.name}")
    with store_errors(f"{address}/{path.name}", filesystem):
        filesystem.get_file(place, str(unfinished))
    if sha256(unfinished) != digest:
        unfinished.unlink()
        raise UserError(f"{address}/{path.name} was changed since it was prepared: delete {address} and prepare again")
    os.replace(unfinished, path)


def _address(folder: Path, store: str) -> str:
    base = store.rstrip("/") if "://" in store else str(Path(store).absolute())
    return f"{base}/{folder.name}"


def _others(folder: Path, shards: list[str]) -> list[Path]:
    """Return the files of a folder that are no shards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.relative_to(folder).as_posix() not in shards and path.name[0] != "."]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel lets go of when its process dies."""
    import fcntl

    with path.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield

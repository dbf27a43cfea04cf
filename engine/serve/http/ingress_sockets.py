"""Where several ingresses of one node meet: a private folder, and a place in it for each, with a socket of its own.

Whoever has a place holds a lock on it, which its process lets go of however it ends. There are more places than ingresses,
so that one which comes for another that still ends needs not wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FOLDER = "manta-ingress"
SPARE = 2  # times as many places as ingresses


@dataclass(frozen=True)
class IngressSocket:
    """One ingress' place; `lock` is held as long as it is open."""

    folder: Path
    number: int
    lock: IO[str]

    def listen(self) -> socket.socket:
        """Return a socket that is bound to the place's path, which only this user can reach."""
        path = path_of(self.folder, self.number)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of the one before
        taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        taken.bind(path)
        return taken


def socket_dir() -> Path:
    """Return the folder of this Ray session on this node, made if need be. Raises PermissionError if others can reach it."""
    import ray

    node: Any = ray._private.worker.global_worker.node  # Ray has no public call for it
    return private(Path(node.get_session_dir_path()) / FOLDER)


def private(folder: Path) -> Path:
    """Return a folder that is this user's alone, made if need be. Raises PermissionError where it is not."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} can be reached by others")
    return folder


def path_of(folder: Path, number: int) -> str:
    """Return the path of a place's socket."""
    return str(folder / f"{number}.sock")


def paths(folder: Path, ingresses: int) -> list[str]:
    """Return the paths at which so many ingresses may listen."""
    return [path_of(folder, number) for number in range(SPARE * ingresses)]


def take_place(folder: Path, ingresses: int) -> IngressSocket:
    """Take the first place that is free. Raises RuntimeError where none is."""
    for number in range(SPARE * ingresses):
        lock = (folder / f"{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return IngressSocket(folder, number, lock)
        except BlockingIOError:
            lock.close()
    raise RuntimeError(f"all {SPARE * ingresses} places in {folder} are taken")

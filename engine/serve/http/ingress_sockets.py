"""Unix sockets of the ingresses of one node: numbered files in a private folder, each claimed by one ingress.

An ingress holds a file lock on its number, which is released however its process ends. There are more numbers than
ingresses, so that an ingress that replaces a stopping one need not wait for it.
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
SOCKETS_PER_INGRESS = 2


@dataclass(frozen=True)
class IngressSocket:
    """The number that an ingress has claimed; `lock` is held as long as it is open."""

    folder: Path
    number: int
    lock: IO[str]

    def listen(self) -> socket.socket:
        """Return a socket that is bound to the number's path, which only this user can reach."""
        path = socket_path(self.folder, self.number)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # left by its former owner
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(path)
        return listening


def socket_dir() -> Path:
    """Return the folder of this Ray session on this node, made if need be. Raises PermissionError if others can reach it."""
    import ray

    node: Any = ray._private.worker.global_worker.node  # Ray has no public API for it
    return make_private_folder(Path(node.get_session_dir_path()) / FOLDER)


def make_private_folder(folder: Path) -> Path:
    """Return a folder that only this user can reach, made if need be. Raises PermissionError if others can reach it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
        raise PermissionError(f"{folder} can be reached by others")
    return folder


def socket_path(folder: Path, number: int) -> str:
    """Return the path of a number's socket."""
    return str(folder / f"{number}.sock")


def socket_paths(folder: Path, ingresses: int) -> list[str]:
    """Return the socket paths of this many ingresses."""
    return [socket_path(folder, number) for number in range(SOCKETS_PER_INGRESS * ingresses)]


def claim_socket(folder: Path, ingresses: int) -> IngressSocket:
    """Claim the first free number. Raises RuntimeError if none is free."""
    for number in range(SOCKETS_PER_INGRESS * ingresses):
        lock = (folder / f"{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return IngressSocket(folder, number, lock)
        except BlockingIOError:
            lock.close()
    raise RuntimeError(f"all {SOCKETS_PER_INGRESS * ingresses} sockets in {folder} are in use")

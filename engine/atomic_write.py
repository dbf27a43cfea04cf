"""Write files and folders whole or not at all: under a hidden temporary name, renamed into place last.

A reader sees the old content or the new, never a part of it. A writer that is killed leaves its `.NAME.part`, which the
next writer of NAME overwrites.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, *, fsync: bool = False, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` when the block ends, and is deleted when the block raises.

    fsync: flush the file to disk before the rename, so that a power loss leaves no empty file under the final name.
    temporary: a path on the same filesystem to use instead of `.NAME.part` beside the file.
    """
    temporary = temporary or path.with_name(f".{path.name}.part")
    try:
        yield temporary
        if fsync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it replaces `folder` when the block ends, and is deleted when the block raises.

    A folder cannot be renamed over another one: the old one is moved aside first, then deleted.
    """
    temporary, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(
    path: Path, content: str | bytes, *, fsync: bool = False, temporary: Path | None = None, mode: int = 0o666
) -> None:
    """Write a file whole or not at all; text as UTF-8. `mode`: its permissions, less the umask."""
    with atomic_file(path, fsync=fsync, temporary=temporary) as part:
        part.unlink(missing_ok=True)  # one that a killed writer left may have other permissions
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)

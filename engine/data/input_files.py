"""Input files: list files, folders and globs, local or in an object store, and open one."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from engine.config import DataConfig
from engine.data.filesystems import RemoteFile, is_remote, remote_errors, resolve_address
from engine.errors import UserError, did_you_mean

COMPRESSION_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True)
class InputFile:
    """One input file."""

    path: str  # on its filesystem
    name: str  # relative to the given path
    split: str | None  # that it was given for; None: each row by hash
    size: int  # in bytes
    version: str  # changes when the content does: modification time, ETag or fingerprint
    filesystem: Any

    @property
    def is_compressed(self) -> bool:
        """Whether it is compressed, so that reading cannot start in the middle."""
        return self.path.lower().endswith(COMPRESSION_SUFFIXES)

    @property
    def address(self) -> str:
        """Its full address: a path, or a URL with its scheme."""
        return str(self.filesystem.unstrip_protocol(self.path)) if is_remote(self.filesystem) else self.path

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open it for reading bytes, decompressed if its name ends in .gz or .zst. Raises UserError where it cannot be read."""
        try:
            with self.open_stored() as raw:
                if self.path.lower().endswith(".gz"):
                    yield gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
                elif self.path.lower().endswith(".zst"):
                    import pyarrow as pa

                    yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), 2**20)  # type: ignore[arg-type]
                else:
                    yield raw
        except (PermissionError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {self.address} ({error}): repair it or leave it out of the path") from error
        except OSError as error:
            if error.errno is not None or not self.is_compressed:
                raise
            raise UserError(f"cannot read {self.address} ({error}): repair it or leave it out of the path") from error

    @contextmanager
    def open_stored(self) -> Iterator[IO[bytes]]:
        """Open it for reading its bytes as they are stored."""
        if is_remote(self.filesystem):
            with RemoteFile(self.filesystem, self.path) as remote:
                yield io.BufferedReader(remote, 2**20)  # type: ignore[misc]
        else:
            with self.filesystem.open(self.path, "rb") as raw:
                yield raw

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of its bytes as they are stored."""
        with self.open_stored() as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()  # type: ignore[arg-type]


def strip_compression_suffix(name: str) -> str:
    """Return a name without the suffix of its compression."""
    return name.rpartition(".")[0] if name.lower().endswith(COMPRESSION_SUFFIXES) else name


def list_files(config: DataConfig) -> list[InputFile]:
    """Return the input files, sorted within each path. Raises UserError for a path where nothing is."""
    if not config.path:
        raise UserError("data.path is not set: say where the training text is with data.path=FILE_FOLDER_OR_GLOB")
    return [
        *list_path("data.test_path", config.test_path, "test"),
        *list_path("data.validation_path", config.validation_path, "validation"),
        *list_path("data.path", config.path, None),
    ]


def list_path(key: str, value: str | None, split: str | None) -> list[InputFile]:
    """List the files of one path: a file, a folder, a glob, or several of these separated by commas."""
    if not value:
        return []
    filesystem, root = resolve_address(f"{key}={value}", value)
    with remote_errors(f"{key}={value}", filesystem):
        if "," in value and not filesystem.exists(root):
            return [file for item in value.split(",") if item.strip() for file in list_path(key, item.strip(), split)]
        info_of, base = _find(key, value, filesystem, root)
    files = [
        InputFile(path, path.removeprefix(base).lstrip("/"), split, info.get("size") or 0, _version(info), filesystem)
        for path, info in sorted(info_of.items())
        if not path.endswith("/")  # an empty folder, as the consoles of some stores create it
    ]
    files = [f for f in files if not any(part.startswith((".", "__pycache__")) for part in f.name.split("/"))]
    if not files:
        raise UserError(f"{key}={value} is a folder with no files in it: put text there or give another path")
    return files


def _find(key: str, value: str, filesystem: Any, root: str) -> tuple[dict[str, Any], str]:
    """Return {path: info} of the files at a path, and the folder to which their names are relative."""
    if filesystem.isfile(root):
        return {root: filesystem.info(root)}, str(PurePosixPath(root).parent)
    if filesystem.isdir(root):
        return filesystem.find(root, detail=True), root
    if set(root) & set("*?["):
        info_of = {path: info for path, info in filesystem.glob(root, detail=True).items() if info["type"] == "file"}
        if not info_of:
            raise UserError(f"{key}='{value}' matches no file: check the pattern ('**' also goes into folders)")
        return info_of, root[: min(i for i, letter in enumerate(root) if letter in "*?[")].rpartition("/")[0]
    parent = str(PurePosixPath(root).parent)
    siblings = filesystem.ls(parent, detail=False) if parent != "." and filesystem.isdir(parent) else []
    hint = did_you_mean(PurePosixPath(root).name, [path.rstrip("/").rsplit("/", 1)[-1] for path in siblings])
    raise UserError(f"{key}={value} does not exist{hint or ': give a file, a folder or a glob'}")


def _version(info: dict[str, Any]) -> str:
    keys = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "created")
    return str(next((info[key] for key in keys if info.get(key)), ""))

"""Local and remote filesystems, through fsspec: addresses with a scheme (s3://, gs://, ...), remote files, and their errors.

The store's own client finds credentials in the environment; no option has them and nothing prints them.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import TransientError, UserError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # scheme -> extra of this package that installs its client
CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL for a store that isn't Amazon's; "
    "FSSPEC_S3_ANON=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`; FSSPEC_GS_TOKEN=anon for a public bucket",
}
CLIENT_PACKAGES = ("s3fs", "botocore", "aiobotocore", "gcsfs", "google", "aiohttp")  # whose errors come from a store
READ_AHEAD_BYTES = 2**23  # that one request fetches


def resolve_address(name: str, address: str) -> tuple[Any, str]:
    """Return the filesystem (fsspec) of an address, and the path on it; `name` is how an error message calls it.

    Raises UserError where the package that reads it is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(address)
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(address.partition("://")[0]) if isinstance(error, ImportError) else None
        if extra:
            raise UserError(
                f"{name} needs a package that is not installed: pip install 'manta-train[{extra}]'"
            ) from error
        raise UserError(
            f"{name} cannot be opened ({error}): install the package that reads it, or copy it to this machine"
        ) from error
    if is_remote(filesystem):
        filesystem.invalidate_cache()  # a listing from before may be outdated
    return filesystem, path


def is_remote(filesystem: Any) -> bool:
    """Return whether a filesystem is another than this machine's disks."""
    return filesystem is not None and "file" not in _schemes(filesystem)


def _schemes(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return protocol if isinstance(protocol, tuple) else (protocol,)


@contextmanager
def remote_errors(name: str, filesystem: Any, action: str = "read") -> Iterator[None]:
    """Raise UserError for the errors of a store's client, each of which has its own error classes. `action`: what failed."""
    try:
        yield
    except Exception as error:
        from_store = isinstance(error, OSError) or type(error).__module__.startswith(CLIENT_PACKAGES)
        if not is_remote(filesystem) or not from_store or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        words = " ".join(str(error).split())[:300] or type(error).__name__
        credentials = CREDENTIALS.get(EXTRAS.get(_schemes(filesystem)[0], ""))
        hint = f", and your credentials ({credentials})" if credentials else ""
        raise TransientError(f"{name} cannot be {action} ({words}): check the address{hint}") from error


def put_file(filesystem: Any, source: Path, target: str) -> None:
    """Upload a local file to a path of a filesystem, making its folder where it is missing."""
    if not EXTRAS.keys() & set(_schemes(filesystem)):  # a bucket has no folders; a mistyped one must not be created
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    filesystem.put_file(str(source), target)


class RemoteFile(io.RawIOBase):
    """A file in a store, for reading; bytes are fetched on demand, with read-ahead."""

    def __init__(self, filesystem: Any, path: str) -> None:
        """Raise UserError where it cannot be opened; reading may raise it too."""
        self._filesystem, self._name = filesystem, str(filesystem.unstrip_protocol(path))
        with remote_errors(self._name, filesystem):
            self._opened = filesystem.open(path, "rb", block_size=READ_AHEAD_BYTES)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there are, up to the buffer's size."""
        with remote_errors(self._name, self._filesystem):
            return int(self._opened.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        return int(self._opened.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return int(self._opened.tell())

    def close(self) -> None:
        """Close it."""
        if not self.closed:
            self._opened.close()
        super().close()

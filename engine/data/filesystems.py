"""Object stores, through fsspec: addresses with a scheme (s3://, gs://, ...), files that come as they are read, and what can go wrong.

Credentials are found by the store's own client, in the environment; no option has them and nothing here prints them.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import TransientError, UserError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # scheme -> what reads it, an extra of ours
CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL for a store that isn't Amazon's; "
    "FSSPEC_S3_ANON=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`; FSSPEC_GS_TOKEN=anon for a public bucket",
}
CLIENTS = ("s3fs", "botocore", "aiobotocore", "gcsfs", "google", "aiohttp")  # packages whose errors are a store's
FETCHED = 2**23  # bytes that one request fetches ahead


def resolve_address(said: str, address: str) -> tuple[Any, str]:
    """Return the filesystem (fsspec) of an address, and the place there; `said` is how a message names it.

    Raises UserError without the package that reads it.
    """
    from fsspec.core import url_to_fs

    try:
        filesystem, place = url_to_fs(address)
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(address.partition("://")[0]) if isinstance(error, ImportError) else None
        if extra:
            raise UserError(
                f"{said} needs a package that is not installed: pip install 'manta-train[{extra}]'"
            ) from error
        raise UserError(f"{said} cannot be opened ({error}): install what reads it, or copy it here") from error
    if is_remote(filesystem):
        filesystem.invalidate_cache()  # what was listed before may be of yesterday
    return filesystem, place


def is_remote(filesystem: Any) -> bool:
    """Say whether a filesystem's files are elsewhere than on this machine's disks."""
    return filesystem is not None and "file" not in _schemes(filesystem)


def _schemes(filesystem: Any) -> tuple[str, ...]:
    named = filesystem.protocol
    return named if isinstance(named, tuple) else (named,)


@contextmanager
def remote_errors(said: str, filesystem: Any, done: str = "read") -> Iterator[None]:
    """Raise UserError for what a store's client raises, each of which has kinds of error of its own."""
    try:
        yield
    except Exception as error:
        of_store = isinstance(error, OSError) or type(error).__module__.startswith(CLIENTS)
        if not is_remote(filesystem) or not of_store or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        words = " ".join(str(error).split())[:300] or type(error).__name__
        how = CREDENTIALS.get(EXTRAS.get(_schemes(filesystem)[0], ""))
        hint = f", and your credentials ({how})" if how else ""
        raise TransientError(f"{said} cannot be {done} ({words}): check the address{hint}") from error


def put_file(filesystem: Any, source: Path, target: str) -> None:
    """Copy a file from here to a place, whose folder is made if need be."""
    if not EXTRAS.keys() & set(_schemes(filesystem)):  # a bucket has no folders, and none is made for a slip of the pen
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    filesystem.put_file(str(source), target)


class RemoteFile(io.RawIOBase):
    """A file in a store, for reading; its bytes are fetched as they are asked for, and some ahead."""

    def __init__(self, filesystem: Any, path: str) -> None:
        """Raise UserError where it cannot be opened; reading raises it too."""
        self._filesystem, self._said = filesystem, str(filesystem.unstrip_protocol(path))
        with remote_errors(self._said, filesystem):
            self._opened = filesystem.open(path, "rb", block_size=FETCHED)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be entered anywhere."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there are, up to the buffer's size."""
        with remote_errors(self._said, self._filesystem):
            return int(self._opened.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        return int(self._opened.seek(offset, whence))

    def tell(self) -> int:
        """Return the place."""
        return int(self._opened.tell())

    def close(self) -> None:
        """Let go of it."""
        if not self.closed:
            self._opened.close()
        super().close()

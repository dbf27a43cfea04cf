"""Bearer keys: random secrets, shown once and kept as SHA-256.

A slow, salted hash protects what people choose. These are 256 random bits, which no search finds, so that one SHA-256 is
enough (NIST SP 800-63B, 5.1.2.2: of 112 bits on) and costs a request a microsecond.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engine.atomic_write import write_atomically
from engine.errors import UserError, nearest

PREFIX = "sk-manta-"
VARIABLE = "MANTA_KEYS"  # of the environment: what a file of keys holds
LOOK_EVERY_S = 1.0  # at the file, for keys that were made or revoked since
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Key:
    """What is kept of a key. Times are seconds since 1970."""

    name: str
    sha256: str  # of the secret, in hex
    created: float
    requests_per_minute: int | None = None  # None: without limit
    tokens_per_minute: int | None = None  # read and written
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float) -> str:
        """Return active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


class Keys:
    """The keys of a file, read again when it changes, and those of an environment variable's text.

    Where there were keys once, a request needs one for as long as the process lives: a file that is gone, or that cannot
    be read any more, opens nothing.
    """

    def __init__(self, file: Path | None, text: str = "") -> None:
        """Read both. Raises UserError for keys that cannot be read."""
        self.file = file
        self._own = parsed(text, VARIABLE) if text else []
        self._seen = self._stamp()
        self._filed = read_keys(file) if file and self._seen else []
        self._looked = time.monotonic()
        self.required = bool(self._own or self._seen)

    def find(self, secret: str, now: float) -> Key | None:
        """Return the key of a secret, be it active or not; all are compared, each in constant time."""
        self._look()
        digest = digest_of(secret)
        found = None
        for key in (*self._own, *self._filed):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _look(self) -> None:
        if time.monotonic() < self._looked + LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        if not stamp:
            self._filed = []
            return
        assert self.file
        with contextlib.suppress(UserError):  # half edited by hand: the keys before it hold until it is whole
            self._filed, self.required = read_keys(self.file), True

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.file.stat() if self.file else None
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None


def digest_of(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def read_keys(file: Path) -> list[Key]:
    """Return the keys of a file; none where it isn't there. Raises UserError."""
    try:
        return parsed(file.read_text(), str(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def parsed(text: str, where: str) -> list[Key]:
    """Return the keys that a text holds: {"keys": [{"name", "sha256", ...}]}. Raises UserError that names the place."""
    try:
        return [_key(entry) for entry in json.loads(text)["keys"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} holds no keys as `manta key new` writes them: {error}") from error


def _key(entry: dict[str, Any]) -> Key:
    known = {f.name for f in fields(Key)}
    if unknown := set(entry) - known:
        raise ValueError(f"{unknown.pop()} is nothing that is known of a key")
    key = Key(**entry)
    if not (isinstance(key.name, str) and NAME.fullmatch(key.name)):
        raise ValueError(f"{key.name!r} cannot name a key")
    if not (isinstance(key.sha256, str) and re.fullmatch("[0-9a-f]{64}", key.sha256)):
        raise ValueError(f"{key.name} has no SHA-256 in hex")
    numbers = (key.created, key.requests_per_minute, key.tokens_per_minute, key.expires, key.revoked)
    for number in numbers:
        if number is not None and (isinstance(number, bool) or not 0 <= number < math.inf):
            raise ValueError(f"{key.name}: {number!r} is not a number of 0 or more")
    return key


def new_key(
    file: Path, name: str, requests_per_minute: int | None, tokens_per_minute: int | None, days: float | None
) -> tuple[str, Key]:
    """Make a key and append it to a file; return its secret, which is kept nowhere, and what is kept.

    Raises UserError where an active key has that name.
    """
    now = time.time()
    secret = PREFIX + secrets.token_urlsafe(32)
    expires = None if days is None else now + 86400 * days
    key = Key(name, digest_of(secret), now, requests_per_minute, tokens_per_minute, expires)
    if not NAME.fullmatch(name):
        raise UserError(f"name='{name}' cannot name a key: use up to 64 letters, digits, '.', '_' and '-'")
    with locked(file):
        keys = read_keys(file)
        if any(it.name == name and it.state(now) == "active" for it in keys):
            raise UserError(f"there is a key '{name}' already: revoke it first (manta key revoke name={name})")
        write_keys(file, [*keys, key])
    return secret, key


def revoke_key(file: Path, name: str) -> Key:
    """Revoke the active key of a name; it opens nothing from a second later on. Raises UserError where there is none."""
    now = time.time()
    with locked(file):
        keys = read_keys(file)
        active = [key for key in keys if key.state(now) == "active"]
        if name not in [key.name for key in active]:
            raise UserError(f"there is no active key '{name}' in {file}{nearest(name, [key.name for key in active])}")
        changed = [Key(**asdict(key) | {"revoked": now}) if key in active and key.name == name else key for key in keys]
        write_keys(file, changed)
    return next(key for key in changed if key.name == name and key.revoked == now)


def write_keys(file: Path, keys: Sequence[Key]) -> None:
    """Write a file of keys, readable by its owner only, whole or not at all."""
    entries = [{name: value for name, value in asdict(key).items() if value is not None} for key in keys]
    write_atomically(file, json.dumps({"keys": entries}, indent=1), fsync=True, mode=0o600)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep others from changing a file of keys for the length of a `with` block."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

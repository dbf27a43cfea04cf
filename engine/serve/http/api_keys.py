"""Bearer API keys: random secrets, shown once and stored as SHA-256.

Passwords that people choose need a slow, salted hash. These secrets are 256 random bits, beyond any search, so that one
SHA-256 is enough (NIST SP 800-63B, 5.1.2.2: from 112 bits on) and costs a request a microsecond.
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
from engine.errors import UserError, did_you_mean

PREFIX = "sk-manta-"
KEYS_VARIABLE = "MANTA_KEYS"  # environment variable with the content of a keys file
RELOAD_EVERY_S = 1.0  # the file, for keys made or revoked since
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class ApiKey:
    """A stored key. Times are seconds since 1970."""

    name: str
    sha256: str  # of the secret, in hex
    created: float
    requests_per_minute: int | None = None  # None: no limit
    tokens_per_minute: int | None = None  # of prompts and completions
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float) -> str:
        """Return active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


class ApiKeys:
    """The keys of a file, reloaded when it changes, and those of an environment variable.

    Once there were keys, requests need one as long as the process lives: a file that is deleted or cannot be read any
    more does not open the endpoint.
    """

    def __init__(self, file: Path | None, text: str = "") -> None:
        """Read both. Raises UserError for keys that cannot be read."""
        self.file = file
        self._variable_keys = parse_keys(text, KEYS_VARIABLE) if text else []
        self._loaded_stamp = self._file_stamp()
        self._file_keys = read_keys(file) if file and self._loaded_stamp else []
        self._checked_at = time.monotonic()
        self.required = bool(self._variable_keys or self._loaded_stamp)

    def find(self, secret: str, now: float) -> ApiKey | None:
        """Return the key of a secret, active or not; all keys are compared, each in constant time."""
        self._reload()
        digest = sha256_of(secret)
        match = None
        for key in (*self._variable_keys, *self._file_keys):
            if hmac.compare_digest(key.sha256, digest):
                match = key
        return match

    def _reload(self) -> None:
        if time.monotonic() < self._checked_at + RELOAD_EVERY_S:
            return
        self._checked_at = time.monotonic()
        stamp = self._file_stamp()
        if stamp == self._loaded_stamp:
            return
        self._loaded_stamp = stamp
        if not stamp:
            self._file_keys = []
            return
        assert self.file
        with contextlib.suppress(UserError):  # being edited by hand: the loaded keys stay valid until it parses again
            self._file_keys, self.required = read_keys(self.file), True

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self.file.stat() if self.file else None
        except OSError:
            return None
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size) if stat else None


def sha256_of(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def read_keys(file: Path) -> list[ApiKey]:
    """Return the keys of a file; none if it does not exist. Raises UserError."""
    try:
        return parse_keys(file.read_text(), str(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def parse_keys(text: str, source: str) -> list[ApiKey]:
    """Return the keys in a JSON text: {"keys": [{"name", "sha256", ...}]}. Raises UserError that names the source."""
    try:
        return [_parse_key(entry) for entry in json.loads(text)["keys"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} holds no keys as `manta key new` writes them: {error}") from error


def _parse_key(entry: dict[str, Any]) -> ApiKey:
    known = {f.name for f in fields(ApiKey)}
    if unknown := set(entry) - known:
        raise ValueError(f"{unknown.pop()} is no field of a key")
    key = ApiKey(**entry)
    if not (isinstance(key.name, str) and KEY_NAME.fullmatch(key.name)):
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
) -> tuple[str, ApiKey]:
    """Make a key and append it to a file; return its secret, which is stored nowhere, and the stored key.

    Raises UserError where an active key has that name.
    """
    now = time.time()
    secret = PREFIX + secrets.token_urlsafe(32)
    expires = None if days is None else now + 86400 * days
    key = ApiKey(name, sha256_of(secret), now, requests_per_minute, tokens_per_minute, expires)
    if not KEY_NAME.fullmatch(name):
        raise UserError(f"name='{name}' cannot name a key: use up to 64 letters, digits, '.', '_' and '-'")
    with lock_keys_file(file):
        keys = read_keys(file)
        if any(key.name == name and key.state(now) == "active" for key in keys):
            raise UserError(f"there is a key '{name}' already: revoke it first (manta key revoke name={name})")
        write_keys(file, [*keys, key])
    return secret, key


def revoke_key(file: Path, name: str) -> ApiKey:
    """Revoke the active key of a name; endpoints refuse it within RELOAD_EVERY_S. Raises UserError if there is none."""
    now = time.time()
    with lock_keys_file(file):
        keys = read_keys(file)
        active = [key for key in keys if key.state(now) == "active"]
        if name not in [key.name for key in active]:
            raise UserError(
                f"there is no active key '{name}' in {file}{did_you_mean(name, [key.name for key in active])}"
            )
        changed = [
            ApiKey(**asdict(key) | {"revoked": now}) if key in active and key.name == name else key for key in keys
        ]
        write_keys(file, changed)
    return next(key for key in changed if key.name == name and key.revoked == now)


def write_keys(file: Path, keys: Sequence[ApiKey]) -> None:
    """Write a keys file atomically, readable by its owner only."""
    entries = [{name: value for name, value in asdict(key).items() if value is not None} for key in keys]
    write_atomically(file, json.dumps({"keys": entries}, indent=1), fsync=True, mode=0o600)


@contextlib.contextmanager
def lock_keys_file(file: Path) -> Iterator[None]:
    """Hold the lock under which a keys file is changed, within a `with` block."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""What `manta cluster up` leaves on disk: the cluster's address, its token and its processes.

All in one folder, `$MANTA_HOME` or `~/.manta`, readable by its owner only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

import psutil

MARK = "MANTA_CLUSTER"  # environment variable that every process of a cluster inherits; its value is State.mark
CORE = ("gcs_server", "raylet")  # a cluster whose head has lost one of these is dead


@dataclasses.dataclass(frozen=True)
class Member:
    """One process. A process id alone may be given anew to a stranger: the start time tells them apart."""

    pid: int
    started: float  # seconds since the epoch
    name: str
    head: bool = True  # whether it is of the head node; of another, the cluster outlives it

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclasses.dataclass(frozen=True)
class State:
    """One local cluster."""

    mark: str
    address: str  # host:port of the GCS
    dashboard: str  # URL
    token_path: str
    temp_dir: str  # Ray's own folder: sockets, logs
    nodes: int
    members: tuple[Member, ...] = ()

    @property
    def logs(self) -> Path:
        """Ray's log files."""
        return Path(self.temp_dir) / "session_latest" / "logs"

    @property
    def lost(self) -> list[str]:
        """Names of the head's core processes that no longer run: none for a healthy cluster."""
        return [m.name for m in self.core if not m.alive]

    @property
    def core(self) -> list[Member]:
        """The processes that the cluster can't live without."""
        return [m for m in self.members if m.name in CORE and m.head]


def member(process: psutil.Process) -> Member:
    """Note down a process. Ray starts the head's raylet with `--head`."""
    name = process.name()
    return Member(process.pid, process.create_time(), name, name != "raylet" or "--head" in process.cmdline())


def processes(cluster: State) -> list[psutil.Process]:
    """Return the running processes of a cluster, and of no other: those noted, marked, or in its folder, and their kin."""
    noted = {m.pid for m in cluster.members if m.alive}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # a process that renames itself loses both mark and command line, but not its parent
            marked = process.environ().get(MARK) == cluster.mark
            if process.pid in noted or marked or cluster.temp_dir in " ".join(process.cmdline()):
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
    found.pop(os.getpid(), None)
    return list(found.values())


def home() -> Path:
    """Return the state folder, made if need be."""
    folder = Path(os.environ.get("MANTA_HOME") or "~/.manta").expanduser().absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def token_path() -> Path:
    """Return the file with this user's Ray token (256 random bits), made at first use, readable by its owner only."""
    path = home() / "token"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def use_token(path: Path | str) -> None:
    """Make Ray, in this process and its children, use the token in this file, unless the user has set one."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(path))
    if "ray" in sys.modules:  # it has read the environment already: let it read it again
        from ray import _raylet

        _raylet.Config.initialize("")  # type: ignore[attr-defined]
        _raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


def load() -> State | None:
    """Return the cluster on record, alive or not, or None."""
    try:
        tree = json.loads((home() / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    return State(**{**tree, "members": tuple(Member(**m) for m in tree["members"])})


def save(state: State) -> None:
    """Write the record, whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=home(), suffix=".json")
    with os.fdopen(descriptor, "w") as file:
        json.dump(dataclasses.asdict(state), file, indent=1)
    os.replace(name, home() / "cluster.json")


def forget() -> None:
    """Remove the record."""
    (home() / "cluster.json").unlink(missing_ok=True)

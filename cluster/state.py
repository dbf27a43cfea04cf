"""The record that `manta cluster up` keeps on disk: the cluster's address, token and processes.

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

CLUSTER_ID_VARIABLE = "MANTA_CLUSTER"  # environment variable that all processes of a cluster inherit; its value is ClusterState.cluster_id
CORE_PROCESSES = ("gcs_server", "raylet")  # without one of these on the head node a cluster is dead


@dataclasses.dataclass(frozen=True)
class ClusterProcess:
    """One process. A process id may be reused by another process: the start time tells them apart."""

    pid: int
    started: float  # seconds since the epoch
    name: str
    head: bool = True  # whether it belongs to the head node; the cluster survives the loss of another node

    @property
    def alive(self) -> bool:
        """Whether this process, and not another with its id, still runs."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclasses.dataclass(frozen=True)
class ClusterState:
    """One local cluster."""

    cluster_id: str
    address: str  # host:port of the GCS
    dashboard: str  # URL
    token_path: str
    temp_dir: str  # Ray's own folder: sockets, logs
    nodes: int
    processes: tuple[ClusterProcess, ...] = ()

    @property
    def logs(self) -> Path:
        """Ray's log files."""
        return Path(self.temp_dir) / "session_latest" / "logs"

    @property
    def lost_processes(self) -> list[str]:
        """Names of the head node's core processes that no longer run; empty for a healthy cluster."""
        return [m.name for m in self.core_processes if not m.alive]

    @property
    def core_processes(self) -> list[ClusterProcess]:
        """The processes that the cluster depends on."""
        return [m for m in self.processes if m.name in CORE_PROCESSES and m.head]


def describe_process(process: psutil.Process) -> ClusterProcess:
    """Describe a running process. Ray starts the raylet of the head node with `--head`."""
    name = process.name()
    return ClusterProcess(process.pid, process.create_time(), name, name != "raylet" or "--head" in process.cmdline())


def find_processes(cluster: ClusterState) -> list[psutil.Process]:
    """Return the running processes of this cluster: those recorded, with its id or its folder, and their descendants."""
    noted = {m.pid for m in cluster.processes if m.alive}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # a process that sets its title hides its environment and command line, but not its parent
            marked = process.environ().get(CLUSTER_ID_VARIABLE) == cluster.cluster_id
            if process.pid in noted or marked or cluster.temp_dir in " ".join(process.cmdline()):
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
    found.pop(os.getpid(), None)
    return list(found.values())


def state_folder() -> Path:
    """Return the state folder; create it if it does not exist."""
    folder = Path(os.environ.get("MANTA_HOME") or "~/.manta").expanduser().absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def token_path() -> Path:
    """Return the file with this user's Ray token (256 random bits), created at first use, readable by its owner only."""
    path = state_folder() / "token"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def set_token(path: Path | str) -> None:
    """Make Ray, in this process and its children, use the token in this file, unless the user has set one."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(path))
    if "ray" in sys.modules:  # Ray has read the environment already: make it read it again
        from ray import _raylet

        _raylet.Config.initialize("")  # type: ignore[attr-defined]
        _raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


def load() -> ClusterState | None:
    """Return the recorded cluster, alive or not, or None."""
    try:
        tree = json.loads((state_folder() / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    return ClusterState(**{**tree, "processes": tuple(ClusterProcess(**p) for p in tree["processes"])})


def save(state: ClusterState) -> None:
    """Write the record atomically."""
    descriptor, name = tempfile.mkstemp(dir=state_folder(), suffix=".json")
    with os.fdopen(descriptor, "w") as file:
        json.dump(dataclasses.asdict(state), file, indent=1)
    os.replace(name, state_folder() / "cluster.json")


def forget() -> None:
    """Remove the record."""
    (state_folder() / "cluster.json").unlink(missing_ok=True)

"""A run's folder: its config, its metrics, its state, and whether this command may go on in it.

runs/<name>/config.yaml  metrics.jsonl  status.json  checkpoints/  bundle/  logs/  profile/
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.atomic_write import write_atomically
from engine.config import Config, declared, identity, to_dict
from engine.errors import UserError


@dataclass(frozen=True)
class Status:
    """What `manta runs` tells of a run."""

    job: str
    state: str  # running, finished, failed, stopped
    step: int = 0
    max_steps: int = 0
    loss: float | None = None
    updated: float = 0.0  # seconds since 1970
    pid: int = 0
    parent: str | None = None  # the bundle that it started from
    data: str | None = None
    message: str = ""


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is made."""
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.bundle = path / "bundle"
        self.logs = path / "logs"
        self.profile = path / "profile"
        self.events = self.logs / "events.log"  # what befell the run: faults, restarts, roll-backs

    def tell(self, text: str) -> None:
        """Say what befell the run, and note it."""
        print(f"warning: {text}", flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Note an event, for the person who follows the run."""
        with contextlib.suppress(OSError), self.events.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def heartbeat(self, rank: int) -> Path:
        """Name the file by which a rank says that it moves."""
        return self.logs / f"heartbeat-{rank}"

    def stacks(self, rank: int) -> Path:
        """Name the file with the Python stacks of a rank that was found hung."""
        return self.logs / f"stacks-worker-{rank}.txt"

    @classmethod
    def claim(cls, config: Config) -> RunFolder:
        """Make or re-enter the folder of a run. Raises UserError, with the differences, if it holds another one."""
        run = cls(config.run_dir)
        try:
            run.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run.path} cannot be made ({error.strerror}): use another runs_dir or name") from error
        if run.config_file.exists():
            run._refuse_another(config)
            status = run.status()
            if status and status.state == "running" and status.pid != os.getpid() and _is_alive(status.pid):
                raise UserError(
                    f"run '{config.name}' is under way (process {status.pid}): wait for it, or use another name"
                )
        write_atomically(run.config_file, yaml.safe_dump(to_dict(config), sort_keys=False))
        return run

    def _refuse_another(self, config: Config) -> None:
        if config.resume:
            return
        before, now = flat(yaml.safe_load(self.config_file.read_text())), identity(config)
        differences = [
            f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]
        ]
        if differences:
            raise UserError(
                f"run '{config.name}' exists with another config ({'; '.join(differences)}): "
                f"use another name=..., or resume=true to go on with the new one"
            )

    def write_status(self, status: Status) -> None:
        """Write status.json whole."""
        write_atomically(self.path / "status.json", json.dumps(asdict(status)))

    def status(self) -> Status | None:
        """Return the last status, if there is one."""
        file = self.path / "status.json"
        return Status(**json.loads(file.read_text())) if file.exists() else None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the logged lines; one that a kill left half is passed over."""
        if not self.metrics_file.exists():
            return
        with self.metrics_file.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


class MetricsLog:
    """Appends a line a step to metrics.jsonl; on a full disk the lines wait for the next call."""

    def __init__(self, run: RunFolder, step: int) -> None:
        """Open the file for the steps after `step`; lines of later steps, from before a kill, are taken out."""
        self._run, self._step, self._waiting = run, step, b""
        self._open()

    def _open(self) -> None:
        kept = [line for line in self._run.metrics() if line["step"] <= self._step]
        write_atomically(self._run.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._run.metrics_file.open("ab", buffering=0)

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Append one line; after a roll-back those of the steps that are taken again are taken out first."""
        if metrics["step"] <= self._step:
            self.close()
            self._step = metrics["step"] - 1
            self._open()
        self._step = metrics["step"]
        self._waiting += json.dumps(metrics).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]

    def close(self) -> None:
        """Write what waits and close the file."""
        self._write()
        self._file.close()


class MetricsTail:
    """Reads a growing metrics.jsonl piece by piece; starts over when a restarted run has put a new file in place."""

    def __init__(self, file: Path) -> None:
        """Follow `file`, which need not be there yet."""
        self._file, self._inode, self._offset = file, -1, 0

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines that are whole and new since the last call."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def list_runs(runs_dir: Path) -> list[tuple[str, Status]]:
    """Return (name, status) of each run, the latest first; one whose process is gone is `stopped`."""
    found = []
    for file in runs_dir.glob("*/status.json"):
        status = Status(**json.loads(file.read_text()))
        if status.state == "running" and not _is_alive(status.pid):
            status = Status(**{**asdict(status), "state": "stopped"})
        found.append((file.parent.name, status))
    return sorted(found, key=lambda item: -item[1].updated)


def now() -> float:
    """Return the seconds since 1970."""
    return time.time()


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of a config as nested dicts."""
    known = {key for key, _, _ in declared()}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        full = prefix + key
        if full not in known and isinstance(value, dict):
            found |= flat(value, f"{full}.")
        else:
            found[full] = value
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def adapter_of(bundle: Path) -> Path:
    """Name the folder of the adapter that a bundle has merged: adapter for bundle, adapter-00000100 for bundle-00000100."""
    name = bundle.name
    return bundle.with_name(name.replace("bundle", "adapter", 1) if name.startswith("bundle") else f"{name}-adapter")

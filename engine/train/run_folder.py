"""A run's folder: its config, metrics and status, and the check that a command may create or resume it.

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
from engine.config import Config, declared, identity, read_tree, to_dict
from engine.errors import UserError


@dataclass(frozen=True)
class RunStatus:
    """The status of a run, as `manta runs` shows it."""

    job: str
    state: str  # running, finished, failed, stopped
    step: int = 0
    max_steps: int = 0
    loss: float | None = None
    updated: float = 0.0  # seconds since 1970
    pid: int = 0
    parent: str | None = None  # the bundle that it was initialized from
    data: str | None = None
    message: str = ""


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        """Name the files; nothing is created."""
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.bundle = path / "bundle"
        self.logs = path / "logs"
        self.profile = path / "profile"
        self.events = self.logs / "events.log"  # faults, restarts, rollbacks

    def report_event(self, text: str) -> None:
        """Print an event of the run, and log it."""
        print(f"warning: {text}", flush=True)
        self.log_event(text)

    def log_event(self, text: str) -> None:
        """Append an event to the log that the driver shows to the user."""
        with contextlib.suppress(OSError), self.events.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def heartbeat(self, rank: int) -> Path:
        """Return the path of a rank's heartbeat file."""
        return self.logs / f"heartbeat-{rank}"

    def stacks(self, rank: int) -> Path:
        """Return the path of the file for the Python stacks of a hung rank."""
        return self.logs / f"stacks-worker-{rank}.txt"

    @classmethod
    def create_or_resume(cls, config: Config) -> RunFolder:
        """Create the folder of a run, or check that it may be resumed. Raises UserError, with the differences, if it may not."""
        run = cls(config.run_dir)
        try:
            run.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run.path} cannot be created ({error.strerror}): use another runs_dir or name") from error
        if run.config_file.exists():
            run._check_same_config(config)
            status = run.status()
            if status and status.state == "running" and status.pid != os.getpid() and _is_alive(status.pid):
                raise UserError(
                    f"run '{config.name}' is running already (process {status.pid}): wait for it, or use another name"
                )
        write_atomically(run.config_file, yaml.safe_dump(to_dict(config), sort_keys=False))
        return run

    def _check_same_config(self, config: Config) -> None:
        if config.resume:
            return
        before, now = flatten_config(read_tree(self.config_file)), identity(config)
        differences = [
            f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]
        ]
        if differences:
            raise UserError(
                f"run '{config.name}' exists with another config ({'; '.join(differences)}): "
                f"use another name=..., or resume=true to continue with the new one"
            )

    def write_status(self, status: RunStatus) -> None:
        """Write status.json atomically."""
        write_atomically(self.path / "status.json", json.dumps(asdict(status)))

    def status(self) -> RunStatus | None:
        """Return the last status; None if there is none."""
        file = self.path / "status.json"
        return RunStatus(**json.loads(file.read_text())) if file.exists() else None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the logged lines, without an incomplete one that a kill has left."""
        if not self.metrics_file.exists():
            return
        with self.metrics_file.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


class MetricsLog:
    """Appends one line per step to metrics.jsonl; lines that a full disk refuses are kept for the next call."""

    def __init__(self, run: RunFolder, step: int) -> None:
        """Open the file for the steps after `step`; lines of later steps, written before a kill, are deleted."""
        self._run, self._step, self._unwritten = run, step, b""
        self._open()

    def _open(self) -> None:
        kept = [line for line in self._run.metrics() if line["step"] <= self._step]
        write_atomically(self._run.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._run.metrics_file.open("ab", buffering=0)

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Append one line; after a rollback the lines of the repeated steps are deleted first."""
        if metrics["step"] <= self._step:
            self.close()
            self._step = metrics["step"] - 1
            self._open()
        self._step = metrics["step"]
        self._unwritten += json.dumps(metrics).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]

    def close(self) -> None:
        """Write pending lines and close the file."""
        self._write()
        self._file.close()


class MetricsTail:
    """Reads the new lines of a growing metrics.jsonl; starts over when a restarted run has replaced the file."""

    def __init__(self, file: Path) -> None:
        """Read `file`, which need not exist yet."""
        self._file, self._inode, self._offset = file, -1, 0

    def lines(self) -> list[dict[str, Any]]:
        """Return the complete lines since the last call."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def list_runs(runs_dir: Path) -> list[tuple[str, RunStatus]]:
    """Return (name, status) of each run, the latest first; a run whose process is gone is "stopped"."""
    runs = []
    for file in runs_dir.glob("*/status.json"):
        status = RunStatus(**json.loads(file.read_text()))
        if status.state == "running" and not _is_alive(status.pid):
            status = RunStatus(**{**asdict(status), "state": "stopped"})
        runs.append((file.parent.name, status))
    return sorted(runs, key=lambda run: -run[1].updated)


def now() -> float:
    """Return the seconds since 1970."""
    return time.time()


def flatten_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of a config given as nested dicts."""
    known = {key for key, _, _ in declared()}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        full = prefix + key
        if full not in known and isinstance(value, dict):
            flat |= flatten_config(value, f"{full}.")
        else:
            flat[full] = value
    return flat


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def adapter_folder(bundle: Path) -> Path:
    """Return the folder of the LoRA adapter that a bundle has merged: adapter for bundle, adapter-00000100 for bundle-00000100."""
    name = bundle.name
    return bundle.with_name(name.replace("bundle", "adapter", 1) if name.startswith("bundle") else f"{name}-adapter")

"""One job's tie to Ray: start or join one, watch that it lives, leave nothing behind."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster import state
from cluster.environment import importable_by_children, loopback_only, quiet_environment, worker_environment
from cluster.errors import ClusterError

REACH_S = 5.0  # to open a connection to a cluster's address
GIVE_UP_S = 6.0  # from a lost Ray to the end of the process, should the main thread be stuck in it
ENDING = (signal.SIGTERM, signal.SIGHUP)
OBJECT_STORE_BYTES = 1 << 30  # shared memory of a job's own Ray, at most; batches are small


@dataclass(frozen=True)
class Session:
    """A Ray that is connected."""

    address: str  # host:port of the GCS
    cpus: float
    gpus: float
    logs: Path  # Ray's log files, while it runs


@contextlib.contextmanager
def connect(address: str, cpus: int | None, dashboard: bool, log_dir: Path) -> Iterator[Session]:
    """Connect this process to Ray for the length of a `with` block.

    `address`: `local` starts a Ray of this job's own on loopback with `cpus` cores (None: all), and ends it afterwards
    whatever happens (an error, Ctrl-C, SIGTERM, SIGHUP); `auto` joins the cluster of `manta cluster up`, or of the
    submitted job that this is; else `host:port` or `ray://host:port`. Ray's own logs are found in `log_dir`/ray.

    Raises ClusterError where there is no such cluster, within ten seconds, and where Ray is killed within the block.
    """
    quiet_environment()
    with signals_kept():
        catch_signals()
        if address == "local":
            with own_ray(cpus, dashboard, log_dir) as session:
                yield session
        else:
            with joined_ray(address, log_dir) as session:
                yield session


@contextlib.contextmanager
def own_ray(cpus: int | None, dashboard: bool, log_dir: Path) -> Iterator[Session]:
    """Start a Ray of this process's own, and end it."""
    state.use_token(state.token_path())
    importable_by_children()
    if not dashboard:
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
    loopback_only()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # no cloud takes this one node away
    folder = Path(tempfile.mkdtemp(prefix="manta-"))  # short: a socket's path may have 107 bytes
    ray_here = state.State(mark=folder.name, address="", dashboard="", token_path="", temp_dir=str(folder), nodes=1)

    def clean_up() -> None:
        end(state.processes(ray_here), own_end_s=0.0, patience_s=0.5)
        keep_logs(folder, log_dir)

    watch: Watch | None = None
    try:
        import ray

        hush(log_dir)
        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=object_store_bytes(),
            _temp_dir=str(folder),
        )
        catch_signals()  # again: ray.init has put its own handler in place
        info: dict[str, Any] = getattr(context, "address_info", None) or {}
        logs = Path(info["session_dir"]) / "logs"
        link(logs, log_dir)
        core = [state.member(p) for p in state.processes(ray_here) if p.name() in state.CORE]
        watch = Watch(core, "Ray was killed: start the job again, with resume=true if it has checkpoints", clean_up)
        with watch.raising():
            yield session_of(info["gcs_address"], logs)
    finally:
        started = state.processes(ray_here)
        lost = watch is not None and watch.lost
        leaving = leave(lost)
        end(started, own_end_s=0.0 if lost else 1.0, patience_s=0.5 if lost else 3.0)
        clean_up()
        if leaving.is_alive():  # from a lost Ray: it gives up after some seconds, and writes into the folder again
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            atexit.register(leaving.join, GIVE_UP_S)  # the last to be registered is the first to run


@contextlib.contextmanager
def joined_ray(address: str, log_dir: Path | None) -> Iterator[Session]:
    """Join a cluster that runs already, and leave it."""
    address, cluster = resolve(address)
    import ray

    if log_dir:
        hush(log_dir)

    if cluster:
        loopback_only()
    # The nodes of `manta cluster up` have this environment already, and a runtime_env costs each worker a fresh start.
    runtime_env = {} if cluster else {"env_vars": worker_environment()}
    watch: Watch | None = None
    try:
        try:
            context = ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env
            )
        except (ConnectionError, RuntimeError, ray.exceptions.RayError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ClusterError(
                f"the Ray at {address} cannot be joined ({first}): see `manta cluster status`"
            ) from error
        catch_signals()
        info: dict[str, Any] = getattr(context, "address_info", None) or {}
        logs = Path(info.get("session_dir") or "") / "logs"
        if log_dir:
            link(logs, log_dir)
        core = cluster.core if cluster else []
        watch = Watch(core, "the cluster's Ray was killed: `manta cluster down`, then `manta cluster up`")
        with watch.raising():
            yield session_of(address, logs)
    finally:
        leave(lost=watch is not None and watch.lost)


def resolve(address: str) -> tuple[str, state.State | None]:
    """Turn `auto` or host:port into an address that answers, and the record of the cluster if it is this machine's.

    Raises ClusterError if none answers.
    """
    cluster = state.load()
    if address == "auto":
        inside = os.environ.get("RAY_ADDRESS")
        if not inside and cluster is None:
            raise ClusterError("no cluster runs here: start one with `manta cluster up`, or use cluster.address=local")
        address = inside or (cluster.address if cluster else "")
    if cluster and address != cluster.address:
        cluster = None
    if cluster:
        if cluster.lost:
            raise ClusterError(
                f"the cluster of `manta cluster up` has lost its {' and '.join(sorted(set(cluster.lost)))}: "
                "`manta cluster down`, then `manta cluster up`"
            )
        state.use_token(cluster.token_path)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster.address={address} is no address: use local, auto, host:port or ray://host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray answers at {address} ({error.strerror or error}): check cluster.address, or use cluster.address=local"
        ) from error
    return address, cluster


class Watch(threading.Thread):
    """Looks after Ray's core processes; a driver of a dead Ray would hang for a minute (GCS) or for ever (raylet)."""

    def __init__(self, members: list[state.Member], message: str, clean_up: Callable[[], None] | None = None) -> None:
        super().__init__(name="ray-watch", daemon=True)
        self.members, self.message, self.clean_up = members, message, clean_up
        self.lost = False
        self.closed = threading.Event()

    def run(self) -> None:
        """Interrupt the main thread once a process is gone; end this one if the main thread cannot be interrupted."""
        while not self.closed.wait(0.5):
            if all(m.alive for m in self.members):
                continue
            self.lost = True
            _thread.interrupt_main()
            if not self.closed.wait(GIVE_UP_S):
                os.write(2, f"{self.message}\n".encode())
                if self.clean_up:
                    self.clean_up()
                os._exit(2)
            return

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Watch during a block, and turn what it raises after a loss into ClusterError."""
        self.start()
        try:
            yield
            self.closed.set()
        except BaseException as error:
            # Ray's own complaint may come before the watch's next look.
            self.lost = self.lost or not all(m.alive for m in self.members)
            self.closed.set()
            if self.lost:
                raise ClusterError(self.message) from error
            raise


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Give back, after a block, the handlers of the signals that `catch_signals` takes."""
    kept = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


def catch_signals() -> None:
    """Turn SIGTERM and SIGHUP into SystemExit(128 + signal), so that `finally` blocks run. Only a main thread can."""

    def leave_now(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            signal.signal(number, leave_now)


def session_of(address: str, logs: Path) -> Session:
    """Describe the Ray that is connected."""
    import ray

    has = ray.cluster_resources()
    return Session(address, has.get("CPU", 0.0), has.get("GPU", 0.0), logs)


def leave(lost: bool) -> threading.Thread:
    """Disconnect from Ray; from a lost one without waiting for an answer that will not come: the thread goes on."""
    import ray

    ending = threading.Thread(target=ray.shutdown, daemon=True)
    ending.start()
    ending.join(1.0 if lost else 30.0)
    return ending


def end(processes: list[psutil.Process], own_end_s: float = 1.0, patience_s: float = 3.0) -> None:
    """End processes: wait `own_end_s` for their own end, then ask them to, and kill them `patience_s` later."""
    _, alive = psutil.wait_procs(processes, timeout=own_end_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=patience_s)


def hush(log_dir: Path) -> None:
    """Send what Ray's background threads print on the driver (a dead raylet's last 20 lines, say) to a log file."""
    from ray._private import worker

    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / "ray-messages.log"

    def write(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in data["lines"])

    worker.print_to_stdstream = write


def object_store_bytes() -> int | None:
    """Return a modest size for Ray's object store that /dev/shm has room for; None (Ray's choice) where there is none."""
    try:
        return int(min(OBJECT_STORE_BYTES, 0.3 * shutil.disk_usage("/dev/shm").free))
    except FileNotFoundError:
        return None


def link(logs: Path, log_dir: Path) -> None:
    """Make `log_dir`/ray lead to Ray's logs."""
    log_dir.mkdir(parents=True, exist_ok=True)
    place = log_dir / "ray"
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    place.symlink_to(logs)


def keep_logs(folder: Path, log_dir: Path) -> None:
    """Move the logs of a Ray that has ended from its temporary folder to `log_dir`/ray, and remove the folder."""
    place = log_dir / "ray"
    if place.is_symlink():
        logs = place.resolve()
        place.unlink()
        if logs.exists():
            shutil.copytree(logs, place, symlinks=True, ignore_dangling_symlinks=True)
    deadline = time.monotonic() + 4
    while folder.exists() and time.monotonic() < deadline:  # a dying process may write a last line
        shutil.rmtree(folder, ignore_errors=True)

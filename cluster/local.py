"""`manta cluster up | down | status`: real Ray nodes on this machine, on loopback, with token authentication."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import node, state
from cluster.environment import LOOPBACK_VARIABLES, set_default_environment
from cluster.errors import ClusterError
from cluster.ports import free_port, is_bindable, port_holder
from cluster.session import end_processes, joined_ray

START_TIMEOUT_S = 90.0  # until all nodes are alive


def up(
    nodes: int = 1, cpus_per_node: int | None = None, port: int = 6379, dashboard_port: int = 8265
) -> state.ClusterState:
    """Start a cluster of `nodes` Ray nodes with `cpus_per_node` cores each (None: the machine's cores / nodes).

    A port in use is replaced by the next free one. Raises ClusterError if a cluster is up already or a node does not start.
    """
    check_no_cluster_is_up()
    if nodes < 1 or (cpus_per_node is not None and cpus_per_node < 1):
        raise ClusterError("a cluster has at least one node with one core: use --nodes 1 --cpus-per-node 1 or more")
    cores = cpus_per_node or max(1, (os.cpu_count() or 1) // nodes)
    port, dashboard_port = free_port(port), free_port(dashboard_port)
    cluster = state.ClusterState(
        cluster_id=uuid.uuid4().hex,
        address=f"127.0.0.1:{port}",
        dashboard=f"http://127.0.0.1:{dashboard_port}",
        token_path=str(state.token_path()),
        temp_dir=tempfile.mkdtemp(prefix="manta-"),  # short: the path of a Unix socket is limited to 107 bytes
        nodes=nodes,
    )
    state.save(cluster)
    try:
        client = f"--ray-client-server-port={free_port(10001)}"
        head = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
        wait_until_started([start_node(cluster, cores, 0, [*head, "--include-dashboard=true", "--no-monitor", client])])
        wait_until_started(
            [start_node(cluster, cores, number, [f"--address={cluster.address}"]) for number in range(1, nodes)]
        )
        wait_until_alive(cluster)
    except BaseException:
        stop_cluster(cluster)
        raise
    cluster = dataclasses.replace(
        cluster, processes=tuple(state.describe_process(p) for p in state.find_processes(cluster))
    )
    state.save(cluster)
    return cluster


def check_no_cluster_is_up() -> None:
    """Raise ClusterError if a cluster is up; clean up after one that has died."""
    old = state.load()
    if old is None:
        return
    if not old.lost_processes and state.find_processes(old):
        raise ClusterError(f"a cluster is up already, at {old.address}: use it, or `manta cluster down` first")
    stop_cluster(old)


def start_node(cluster: state.ClusterState, cores: int, number: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Launch one node as a background process. Node 0 is the head.

    Each other node has its own folder: in a shared one a node would delete the working directory of another node's job.
    """
    folder = Path(cluster.temp_dir) / f"n{number}" if number else Path(cluster.temp_dir)
    set_default_environment()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    environment |= LOOPBACK_VARIABLES | {
        "RAY_health_check_period_ms": "1000",  # Ray declares a node dead after five missed checks: 3 s each by default
        state.CLUSTER_ID_VARIABLE: cluster.cluster_id,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": cluster.token_path,
    }
    common = [
        "--node-ip-address=127.0.0.1",
        f"--num-cpus={cores}",
        f"--temp-dir={folder}",
        "--dashboard-agent-listen-port=0",  # any free port, for the workers too: several nodes share the address
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    with (state.state_folder() / "start.log").open("ab") as log:
        # -P keeps the script's folder off sys.path, where its `jobs` would hide the package `jobs`
        return subprocess.Popen(
            [sys.executable, "-P", node.__file__, *common, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal must not stop the nodes
        )


def wait_until_started(starting: list[subprocess.Popen[bytes]]) -> None:
    """Wait until these nodes have started. Raises ClusterError if one has not."""
    for process in starting:
        try:
            code: int | str = process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = f"none within {START_TIMEOUT_S:g} s"
        if code != 0:
            raise ClusterError(f"a Ray node did not start (exit code {code}): see {state.state_folder() / 'start.log'}")


def wait_until_alive(cluster: state.ClusterState) -> None:
    """Wait until the dashboard counts all nodes as alive. Raises ClusterError after START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if count_alive_nodes(cluster) == cluster.nodes:
                return
        time.sleep(0.2)
    raise ClusterError(f"not all of {cluster.nodes} nodes came alive in {START_TIMEOUT_S:g} s: see {cluster.logs}")


def count_alive_nodes(cluster: state.ClusterState) -> int:
    """Return how many nodes the dashboard counts as alive."""
    token = Path(cluster.token_path).read_text().strip()
    request = urllib.request.Request(
        f"{cluster.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=5) as response:
        summary = json.load(response)["data"]["summary"]
    return sum(n.get("raylet", {}).get("state") == "ALIVE" for n in summary)


def down() -> bool:
    """Stop the recorded cluster: its own processes and no others. Returns False if none is recorded."""
    cluster = state.load()
    if cluster is None:
        return False
    stop_cluster(cluster)
    return True


def stop_cluster(cluster: state.ClusterState) -> None:
    """Stop a cluster's processes, copy its logs to the state folder, and remove its record."""
    for _ in range(2):  # a worker may have started while the others were stopped
        alive = state.find_processes(cluster)
        end_processes(alive, exit_timeout_s=0)
    kept = state.state_folder() / "logs"
    shutil.rmtree(kept, ignore_errors=True)
    if cluster.logs.exists():
        shutil.copytree(cluster.logs.resolve(), kept, symlinks=True, ignore_dangling_symlinks=True)
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    state.forget()


def status(console: Console) -> None:
    """Print nodes, resources and jobs. Raises ClusterError if there is no cluster or it has died."""
    from cluster.jobs import job_client, jobs_table

    os.environ.pop("RAY_ADDRESS", None)
    with joined_ray("auto", None) as session:
        import ray

        nodes, total, free = ray.nodes(), ray.cluster_resources(), ray.available_resources()
    cluster = state.load()
    assert cluster is not None
    table = Table(title=f"cluster at {session.address}", title_justify="left")
    for column in ("node", "state", "cores", "GPUs", "memory"):
        table.add_column(column)
    for n in nodes:
        has = n["Resources"]
        memory = f"{has.get('memory', 0) / 2**30:.1f} GiB"
        life = "alive" if n["Alive"] else "dead"
        table.add_row(n["NodeID"][:12], life, f"{has.get('CPU', 0):g}", f"{has.get('GPU', 0):g}", memory)
    console.print(table)
    for name, unit in (("CPU", "cores"), ("GPU", "GPUs")):
        if total.get(name):
            console.print(f"{total[name] - free.get(name, 0):g} of {total[name]:g} {unit} in use")
    console.print(f"dashboard {cluster.dashboard}   logs {cluster.logs}")
    console.print(jobs_table(job_client(None, None)))


def main(argv: list[str]) -> int:
    """Run `manta cluster ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="manta cluster", description="A Ray cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    starts = commands.add_parser("up", help="start Ray nodes, on loopback, with token authentication")
    starts.add_argument("--nodes", type=int, default=1, help="Ray nodes (default 1)")
    starts.add_argument("--cpus-per-node", type=int, help="cores of each node (default: the machine's / nodes)")
    starts.add_argument("--port", type=int, default=6379, help="port of the cluster (default 6379, or the next free)")
    starts.add_argument(
        "--dashboard-port", type=int, default=8265, help="port of the dashboard and the Jobs API (8265)"
    )
    commands.add_parser("down", help="stop them")
    commands.add_parser("status", help="nodes, resources in use, jobs")
    options = parser.parse_args(argv)
    console = Console()
    if options.command == "up":
        return run_up(options, console)
    if options.command == "down":
        console.print("the cluster is down" if down() else "no cluster was up")
    else:
        status(console)
    return 0


def run_up(options: argparse.Namespace, console: Console) -> int:
    """Run `manta cluster up`."""
    check_no_cluster_is_up()
    for port in (options.port, options.dashboard_port):
        if not is_bindable(port):
            console.print(f"port {port} is held by {port_holder(port)}: taking the next free one")
    start_time = time.monotonic()
    with console.status(f"starting {options.nodes} Ray node{'s' * (options.nodes != 1)}"):
        cluster = up(options.nodes, options.cpus_per_node, options.port, options.dashboard_port)
    console.print(f"{cluster.nodes} node{'s' * (cluster.nodes != 1)} alive after {time.monotonic() - start_time:.1f} s")
    console.print(f"address    {cluster.address}")
    console.print(f"dashboard  {cluster.dashboard}   (asks for the token in {cluster.token_path})", soft_wrap=True)
    console.print(f"logs       {cluster.logs}", soft_wrap=True)
    console.print("submit     manta submit pretrain train.max_steps=200 name=mine")
    console.print("stop       manta cluster down")
    return 0

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
from cluster.environment import LOOPBACK, quiet_environment
from cluster.errors import ClusterError
from cluster.ports import bindable, free_port, holder
from cluster.session import end, joined_ray

START_S = 90.0  # for all nodes to be alive


def up(nodes: int = 1, cpus_per_node: int | None = None, port: int = 6379, dashboard_port: int = 8265) -> state.State:
    """Start a cluster of `nodes` Ray nodes with `cpus_per_node` cores each (None: the machine's cores / nodes).

    A port in use is replaced by the next free one. Raises ClusterError if a cluster runs already or a node won't start.
    """
    refuse_second()
    if nodes < 1 or (cpus_per_node is not None and cpus_per_node < 1):
        raise ClusterError("a cluster has at least one node with one core: use --nodes 1 --cpus-per-node 1 or more")
    cores = cpus_per_node or max(1, (os.cpu_count() or 1) // nodes)
    port, dashboard_port = free_port(port), free_port(dashboard_port)
    cluster = state.State(
        mark=uuid.uuid4().hex,
        address=f"127.0.0.1:{port}",
        dashboard=f"http://127.0.0.1:{dashboard_port}",
        token_path=str(state.token_path()),
        temp_dir=tempfile.mkdtemp(prefix="manta-"),  # short: a socket's path may have 107 bytes
        nodes=nodes,
    )
    state.save(cluster)
    try:
        client = f"--ray-client-server-port={free_port(10001)}"
        head = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
        finish([start(cluster, cores, 0, [*head, "--include-dashboard=true", "--no-monitor", client])])
        finish([start(cluster, cores, number, [f"--address={cluster.address}"]) for number in range(1, nodes)])
        wait_alive(cluster)
    except BaseException:
        down_cluster(cluster)
        raise
    cluster = dataclasses.replace(cluster, members=tuple(state.member(p) for p in state.processes(cluster)))
    state.save(cluster)
    return cluster


def refuse_second() -> None:
    """Raise ClusterError if a cluster is up; clear away the rest of one that has died."""
    old = state.load()
    if old is None:
        return
    if not old.lost and state.processes(old):
        raise ClusterError(f"a cluster is up already, at {old.address}: use it, or `manta cluster down` first")
    down_cluster(old)


def start(cluster: state.State, cores: int, number: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Begin to start one node; it goes into the background by itself. Node 0 is the head.

    The others have a folder of their own: in a shared one a node would delete the working directory of another's job.
    """
    folder = Path(cluster.temp_dir) / f"n{number}" if number else Path(cluster.temp_dir)
    quiet_environment()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    environment |= LOOPBACK | {
        "RAY_health_check_period_ms": "1000",  # Ray misses a node after five of these: 3 s each by default
        state.MARK: cluster.mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": cluster.token_path,
    }
    common = [
        "--node-ip-address=127.0.0.1",
        f"--num-cpus={cores}",
        f"--temp-dir={folder}",
        "--dashboard-agent-listen-port=0",  # this and the workers' ports: any free one, several nodes share the address
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    with (state.home() / "start.log").open("ab") as log:
        # -P: the script's folder stays off the path, where its `jobs` and `local` would hide others
        return subprocess.Popen(
            [sys.executable, "-P", node.__file__, *common, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal later must not end the nodes
        )


def finish(starting: list[subprocess.Popen[bytes]]) -> None:
    """Wait until these nodes have started. Raises ClusterError if one hasn't."""
    for process in starting:
        try:
            code: int | str = process.wait(START_S)
        except subprocess.TimeoutExpired:
            code = f"none within {START_S:g} s"
        if code != 0:
            raise ClusterError(f"a Ray node did not start (exit code {code}): see {state.home() / 'start.log'}")


def wait_alive(cluster: state.State) -> None:
    """Wait until the dashboard counts all nodes as alive. Raises ClusterError after START_S."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if alive_nodes(cluster) == cluster.nodes:
                return
        time.sleep(0.2)
    raise ClusterError(f"not all of {cluster.nodes} nodes came alive in {START_S:g} s: see {cluster.logs}")


def alive_nodes(cluster: state.State) -> int:
    """Return how many nodes the dashboard counts as alive."""
    token = Path(cluster.token_path).read_text().strip()
    request = urllib.request.Request(
        f"{cluster.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        summary = json.load(answer)["data"]["summary"]
    return sum(n.get("raylet", {}).get("state") == "ALIVE" for n in summary)


def down() -> bool:
    """Stop the cluster on record, exactly its processes. Returns False if there is none on record."""
    cluster = state.load()
    if cluster is None:
        return False
    down_cluster(cluster)
    return True


def down_cluster(cluster: state.State) -> None:
    """Stop a cluster's processes, keep its logs in the state folder, forget it."""
    for _ in range(2):  # a worker may have been born while the others were ended
        alive = state.processes(cluster)
        end(alive, own_end_s=0)
    kept = state.home() / "logs"
    shutil.rmtree(kept, ignore_errors=True)
    if cluster.logs.exists():
        shutil.copytree(cluster.logs.resolve(), kept, symlinks=True, ignore_dangling_symlinks=True)
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    state.forget()


def status(console: Console) -> None:
    """Print nodes, resources and jobs. Raises ClusterError if there is no cluster or it is dead."""
    from cluster.jobs import client_of, jobs_table

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
    console.print(jobs_table(client_of(None, None)))


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
        return main_up(options, console)
    if options.command == "down":
        console.print("the cluster is down" if down() else "no cluster was up")
    else:
        status(console)
    return 0


def main_up(options: argparse.Namespace, console: Console) -> int:
    """Run `manta cluster up`."""
    refuse_second()
    for port in (options.port, options.dashboard_port):
        if not bindable(port):
            console.print(f"port {port} is held by {holder(port)}: taking the next free one")
    begun = time.monotonic()
    with console.status(f"starting {options.nodes} Ray node{'s' * (options.nodes != 1)}"):
        cluster = up(options.nodes, options.cpus_per_node, options.port, options.dashboard_port)
    console.print(f"{cluster.nodes} node{'s' * (cluster.nodes != 1)} alive after {time.monotonic() - begun:.1f} s")
    console.print(f"address    {cluster.address}")
    console.print(f"dashboard  {cluster.dashboard}   (asks for the token in {cluster.token_path})", soft_wrap=True)
    console.print(f"logs       {cluster.logs}", soft_wrap=True)
    console.print("submit     manta submit pretrain train.max_steps=200 name=mine")
    console.print("stop       manta cluster down")
    return 0

"""A real cluster of two nodes on this machine: up, a job, its code, a refusal, a death, down."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster import local, state
from cluster.errors import ClusterError
from cluster.ports import free_port
from tests.ports import listened

pytestmark = pytest.mark.usefixtures("only_local_cluster")

ROOT = Path(__file__).parents[2]
PRETRAIN = """
import sys, time
import ray
ray.init(address="auto", log_to_driver=False, logging_level="error")

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def node():
    import jobs
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id()

if __name__ == "__main__":
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    print("nodes", len(set(ray.get([node.remote() for _ in range(2)]))), "data", given.get("data.path"), flush=True)
    time.sleep(float(given.get("sleep", 0)))
    sys.exit(int(given.get("code", 0)))
"""


def run(command: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this package as the console script does."""
    code = (
        "import sys, importlib; from cluster.errors import ClusterError\n"
        f"main = importlib.import_module('cluster.{command}').main\n"
        "try: sys.exit(main(sys.argv[1:]))\n"
        "except ClusterError as error: print(error, file=sys.stderr); sys.exit(2)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Make a project with one job, and a state folder of its own."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pyproject.toml").write_text('[project]\nname = "manta-train"\n')
    (folder / "jobs").mkdir()
    (folder / "jobs/__init__.py").touch()
    (folder / "jobs/pretrain.py").write_text(PRETRAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANTA_HOME", str(folder / "home"))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="module")
def cluster(project):
    """Start the cluster once for all tests here, and stop it whatever happens."""
    try:
        yield local.up(nodes=2, cpus_per_node=1, port=free_port(26379), dashboard_port=free_port(28265))
    finally:
        local.down()


def test_two_nodes_alive_on_loopback_only(cluster):
    assert local.count_alive_nodes(cluster) == 2
    processes = state.find_processes(cluster)
    assert sorted(p.name() for p in processes if p.name() in state.CORE_PROCESSES) == ["gcs_server", "raylet", "raylet"]
    assert listened(processes) == {"127.0.0.1"}
    assert Path(cluster.token_path).stat().st_mode & 0o777 == 0o600


def test_a_second_one_is_refused(cluster, project):
    done = run("local", "up", folder=project)
    assert done.returncode == 2
    assert f"a cluster is up already, at {cluster.address}" in done.stderr


def test_a_submitted_job_is_followed_to_its_code(cluster, project):
    done = run("submit", "pretrain", "data.path=a.txt", folder=project)
    assert done.returncode == 0, done.stderr
    assert f"nodes 2 data {project}/a.txt\n" in done.stdout
    assert done.stderr == ""
    assert done.stdout.startswith("submitted raysubmit_")
    assert len(done.stdout.splitlines()) == 2, done.stdout  # none of Ray's own words
    failed = run("submit", "pretrain", "code=3", folder=project)
    assert failed.returncode == 3
    listed = run("jobs", folder=project).stdout
    assert listed.count("raysubmit_") == 2
    assert "succeeded" in listed
    assert "failed" in listed


def test_a_job_is_stopped(cluster, project):
    job = run("submit", "--no-wait", "pretrain", "sleep=100", folder=project).stdout.strip()
    assert job.startswith("raysubmit_")
    assert run("jobs", "stop", job, folder=project).stdout == f"{job} is stopped\n"
    assert run("jobs", "logs", "no-such-job", folder=project).returncode == 2


def test_without_the_token_nothing_is_told(cluster, project):
    for headers, code in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(
                urllib.request.Request(f"{cluster.dashboard}/api/jobs/", headers=headers), timeout=60
            )
        assert refused.value.code == code
    done = run("submit", "pretrain", folder=project, RAY_AUTH_TOKEN="wrong")
    assert done.returncode == 2
    assert done.stderr.startswith(f"the cluster at {cluster.dashboard} refused the token: give")
    elsewhere = run("jobs", "--address", cluster.dashboard, folder=project, MANTA_HOME=str(project / "other"))
    assert elsewhere.returncode == 2
    assert "refused a request without a token" in elsewhere.stderr


def test_status(cluster, project):
    for _ in range(10):  # what a stopped job had is free a moment later
        done = run("local", "status", folder=project)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("alive") == 2
        if "0 of 2 cores in use" in done.stdout:
            return
    raise AssertionError(done.stdout)


def test_a_killed_raylet_is_told_and_down_leaves_nothing(cluster, project):
    processes = state.find_processes(cluster)
    next(p for p in processes if p.name() == "raylet" and "--head" in p.cmdline()).kill()
    time.sleep(0.5)
    for command in (("local", "status"), ("submit", "pretrain")):
        begun = time.monotonic()
        done = run(*command, folder=project)
        assert done.returncode == 2
        assert "has lost its raylet: `manta cluster down`" in done.stderr
        assert time.monotonic() - begun < 60  # Ray's own client would try for minutes
    assert local.down()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert state.load() is None
    assert not Path(cluster.temp_dir).exists()
    with pytest.raises(ClusterError, match="at least one node"):
        local.up(nodes=0)

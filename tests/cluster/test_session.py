"""A Ray of a job's own: what it has, that it stays on loopback, and that nothing is left of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.errors import ClusterError
from cluster.session import connect, resolve
from tests.ports import listened

JOB = """
import sys, time
from pathlib import Path
import ray
from cluster.errors import ClusterError
from cluster.session import connect

@ray.remote
def work(seconds):
    import cluster.ports  # the workers find the project too
    time.sleep(seconds)

try:
    with connect("local", 2, False, Path(sys.argv[1])) as session:
        print("cores", session.cpus, "gpus", session.gpus, flush=True)
        print("working", flush=True)
        ray.get(work.remote(float(sys.argv[2])))
        print("done", flush=True)
except ClusterError as error:
    print("error:", error, flush=True)
    sys.exit(2)
"""
ROOT = Path(__file__).parents[2]


class Job:
    """A job in a process of its own, as a user starts one."""

    def __init__(self, folder: Path, seconds: float) -> None:
        (folder / "job.py").write_text(JOB)
        environment = {**os.environ, "MANTA_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "job.py"), str(folder / "logs"), str(seconds)],
            env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        self.output = ""

    def wait_for(self, word: str) -> None:
        while word not in self.output:
            line = self.process.stdout.readline()
            assert line, f"ended before '{word}': {self.output}"
            self.output += line

    def kin(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self, timeout: float = 120) -> int:
        self.output += self.process.communicate(timeout=timeout)[0]
        return self.process.returncode


@pytest.fixture
def job(tmp_path, request):
    began = time.monotonic()
    job = Job(tmp_path, getattr(request, "param", 100))
    kin: list[psutil.Process] = []
    try:
        job.wait_for("working")
        job.took = time.monotonic() - began
        kin = job.kin()
        assert {"gcs_server", "raylet"} <= {p.name() for p in kin}
        job.started = kin
        raylet = next(p for p in kin if p.name() == "raylet")
        job.folder = Path(next(a for a in raylet.cmdline() if "--raylet_socket_name=" in a).split("=")[1]).parents[2]
        yield job
    finally:
        for process in [*kin, psutil.Process(job.process.pid)] if job.process.poll() is None else kin:
            if process.is_running():
                process.kill()


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


@pytest.mark.parametrize("job", [0.5], indirect=True)
def test_a_job_ends_well(job, tmp_path):
    assert job.finish() == 0
    assert "cores 2.0 gpus 0.0" in job.output
    assert len(job.output.splitlines()) == 3, job.output  # and not a word from Ray
    assert (tmp_path / "logs/ray/raylet.out").is_file()
    assert not job.folder.exists()
    assert (tmp_path / "home/token").stat().st_mode & 0o777 == 0o600
    assert gone(job.started)


def test_ctrl_c_leaves_nothing(job):
    os.kill(job.process.pid, signal.SIGINT)
    job.finish()
    assert gone(job.started)


def test_sigterm_leaves_nothing_and_only_loopback_was_listened_on(job):
    assert listened(job.started) == {"127.0.0.1"}
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.finish() == 143
    assert gone(job.started)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_killed_ray_is_told_within_ten_seconds(job, name):
    killed, slow = time.monotonic(), job.took  # about three seconds where nothing else runs
    next(p for p in job.started if p.name() == name).kill()
    assert job.finish() == 2
    assert time.monotonic() - killed < 10 + slow
    assert "Ray was killed: start the job again" in job.output
    assert "Traceback" not in job.output
    assert "state-dump" not in job.output
    assert gone(job.started)
    assert not job.folder.exists()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("auto", "no cluster runs here: start one with `manta cluster up`"),
        ("127.0.0.1:9", "no Ray answers at 127.0.0.1:9"),
        ("nonsense", "cluster.address=nonsense is no address"),
    ],
)
def test_no_cluster_there(address, sentence, monkeypatch, tmp_path):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=sentence):
        resolve(address)
    with pytest.raises(ClusterError, match=sentence), connect(address, None, False, tmp_path):
        pass

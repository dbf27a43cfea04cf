"""Elastic training: a node is preempted, lost and comes back; the run continues with the workers left, on the same curve."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster import local, state
from cluster.ports import free_port
from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train.job import TrainJob
from engine.train.launch import worker_resources
from engine.train.run_folder import RunFolder
from jobs.entry import compose
from tests.conftest import TINY
from tests.engine.train.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("only_local_cluster")

ROOT = Path(__file__).parents[3]
STEPS = 500
LONG = {"train.max_steps": STEPS, "train.checkpoint_every": 1000, "optim.lr": 2e-4}
# Makes each step 0.2 s longer in all processes of the cluster, so that there is time to lose a node and to restart it.
SLOW_STEPS = """
import importlib.abc, importlib.machinery, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "engine.train.loop":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            step = module.train_step
            module.train_step = lambda run: (time.sleep(0.2), step(run))[1]
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
NOTICE_S = 60
DRAIN = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
nodes = client.get_all_node_info(timeout=10)
node = next(node for node, info in nodes.items() if info.state == 0 and not info.is_head_node)
print(client.drain_node(node.hex(), 2, "spot", int(1000 * (time.time() + float(sys.argv[2])))))  # 2: preemption
"""


def test_an_elastic_run_needs_resources_for_min_workers_only(tiny: Config) -> None:
    values = {"train.workers": 4, "train.cpus_per_worker": 1.0}
    with pytest.raises(UserError, match="4 workers x 1 cores are needed"):
        worker_resources(with_values(tiny, values), {"CPU": 2.0})
    assert worker_resources(with_values(tiny, values | {"train.min_workers": 2}), {"CPU": 2.0}) == {"CPU": 1.0}
    with pytest.raises(UserError, match="3 workers x 1 cores are needed"):
        worker_resources(with_values(tiny, values | {"train.min_workers": 3}), {"CPU": 2.0})
    with pytest.raises(UserError, match=r"use train\.min_workers=4 or less"):
        with_values(tiny, values | {"train.min_workers": 5})


def test_a_worker_group_grows_once_a_checkpoint_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
    from ray.train.v2.api.config import ScalingConfig

    from engine.train import elastic

    resources = {"a": {"CPU": 1.0}}
    monkeypatch.setattr(elastic.ElasticPolicy, "_maybe_send_resource_request", lambda self: None)
    monkeypatch.setattr(elastic.ElasticPolicy, "_get_reserved_resources", lambda self: resources)
    monkeypatch.setattr(elastic, "all_nodes_reachable", lambda: reachable[0])
    scaling = ScalingConfig(
        num_workers=(1, 2), resources_per_worker={"CPU": 1.0}, elastic_resize_monitor_interval_s=0.0
    )
    policy, reachable, requests = elastic.ElasticPolicy(scaling, tmp_path), [False], []
    monkeypatch.setattr(elastic, "POLL_S", 0.0)
    # The policy waits for a node that Ray still counts but that cannot be reached.
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    reachable[0] = True
    assert policy.make_decision_for_non_running_worker_group() == ResizeDecision(1, {"CPU": 1.0})
    group = SimpleNamespace(start_time=0.0, num_workers=1, workers=[SimpleNamespace(execute_async=requests.append)])

    def decide() -> object:
        return policy.make_decision_for_running_worker_group(group, None)

    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "manifest.json").touch()
    assert isinstance(decide(), NoopDecision)
    assert requests == []
    resources["b"] = {"CPU": 4.0}
    assert isinstance(decide(), NoopDecision)  # there are resources: a checkpoint is requested first
    assert isinstance(decide(), NoopDecision)
    assert requests == [elastic.request_save]
    (tmp_path / "step-00000007").mkdir()
    assert isinstance(decide(), NoopDecision)
    (tmp_path / "step-00000007" / "manifest.json").touch()
    assert decide() == ResizeDecision(2, {"CPU": 1.0})
    # Fewer than min_workers is no worker group.
    resources.clear()
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)


@contextlib.contextmanager
def slow_nodes(folder: Path, nodes: int) -> Iterator[state.ClusterState]:
    """Start nodes with one core each, where each step takes 0.2 s longer."""
    with pytest.MonkeyPatch.context() as patch:
        (folder / "sitecustomize.py").write_text(SLOW_STEPS)
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
        patch.setenv("MANTA_HOME", str(folder / "home"))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        try:
            yield local.up(nodes=nodes, cpus_per_node=1, port=free_port(26379), dashboard_port=free_port(28265))
        finally:
            local.down()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[state.ClusterState]:
    with slow_nodes(tmp_path, 2) as cluster:
        yield cluster


def wait(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run is over"
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def command(tiny: Config) -> list[str]:
    """Return the run's overrides as on a command line."""
    elastic = {
        "train.workers": 2,
        "train.min_workers": 1,
        "train.resize_every_s": 2,
        "zero.stage": 2,
        "name": "elastic",
    }
    values = TINY | LONG | elastic | {"runs_dir": str(tiny.runs_dir), "cluster.address": "auto"}
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


@pytest.fixture
def expected(command: list[str]) -> list[dict[str, Any]]:
    """Return the lines of the same run on one rank."""
    alone = {"name": "not-elastic", "train.workers": 1, "train.min_workers": None}
    config = with_values(compose("pretrain", command), alone)
    return run_ranks([TrainJob(config, prepare(config))], 1)[0]


@pytest.mark.slow
def test_losing_and_regaining_a_node_changes_nothing(
    tiny: Config, command: list[str], expected: list[dict[str, Any]], cluster: state.ClusterState, tmp_path: Path
) -> None:
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster.token_path, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    }  # fmt: skip
    run = RunFolder(Path(tiny.runs_dir) / "elastic")

    def steps() -> int:
        return run.metrics_file.read_bytes().count(b"\n") if run.metrics_file.exists() else 0

    def has_event(text: str) -> bool:
        return run.events.exists() and text in run.events.read_text()

    with (
        (tmp_path / "output.txt").open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "jobs.manta", "pretrain", *command], env=environment, stdout=output, stderr=output
        ) as process,
    ):
        try:
            wait(lambda: steps() >= 10, process)
            notice = subprocess.run(
                [sys.executable, "-c", DRAIN, cluster.address, str(NOTICE_S)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert "True" in notice.stdout, notice.stderr
            # Only the last step is due for a checkpoint: this one is requested by the preemption notice.
            wait(lambda: list(run.checkpoints.glob("step-*/manifest.json")), process, NOTICE_S)
            for lost in other_node(cluster):
                lost.kill()
            wait(lambda: has_event("continues with 1 workers instead of 2"), process)
            before = steps()
            wait(lambda: steps() > before + 5, process)
            local.wait_until_started([local.start_node(cluster, 1, 2, [f"--address={cluster.address}"])])
            wait(lambda: has_event("continues with 2 workers instead of 1"), process)
            assert process.wait(300) == 0, (tmp_path / "output.txt").read_text()
        finally:
            process.terminate()
    lines = list(run.metrics())
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
    assert [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in expected]
    assert re.search(r"warning: the run continues with 1 workers instead of 2", (tmp_path / "output.txt").read_text())


def other_node(cluster: state.ClusterState) -> list[psutil.Process]:
    """Return the processes of the node that is not the head."""
    raylets = [p for p in state.find_processes(cluster) if p.name() == "raylet" and "--head" not in p.cmdline()]
    return [kin for raylet in raylets for kin in (raylet, *raylet.children(recursive=True))]

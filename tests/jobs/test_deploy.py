"""An endpoint on a cluster that stays up, changed and rolled back by commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.config import Config
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import background_load, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.usefixtures("only_local_cluster")

ASK = {"model": "writer", "prompt": "import os", "max_tokens": 4, "temperature": 0}


def manta(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    return subprocess.run(
        [sys.executable, "-m", "jobs.manta", *args], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**environment, "MANTA_HOME": str(folder / "home"), "COLUMNS": "200"},
    )  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    try:
        up = manta(tmp_path, "cluster", "up", "--cpus-per-node", "4", "--port", str(free_port()))
        assert up.returncode == 0, up.stderr
        yield tmp_path
    finally:
        assert manta(tmp_path, "cluster", "down").returncode == 0


@pytest.mark.slow
def test_endpoint_is_changed_and_rolled_back(cluster: Path, tiny: Config) -> None:
    one, two = (
        fresh_bundle(tiny, cluster / "runs" / name / "bundle", seed) for seed, name in enumerate(["one", "two"])
    )
    port = free_port()
    options = ["cluster=auto", f"serve.port={port}", "serve.names=writer", "serve.max_replicas=1"]
    canary = ["serve.strategy=canary", "serve.canary_stages=[0.5,1.0]", "serve.canary_requests=10", "serve.canary_stage_s=1",
             "serve.canary_latency_margin=10"]  # fmt: skip
    first = manta(cluster, "deploy", "bundle=one", *options, "serve.detach=true")
    assert first.returncode == 0, first.stdout + first.stderr
    url = f"http://127.0.0.1:{port}"

    def served() -> str:
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
        return str(model["hash"])

    assert served() == one.hash
    with background_load(url, ASK, clients=2) as requests:
        wait_for(lambda: len(requests) > 10)
        changed = manta(cluster, "deploy", "bundle=two", *options, *canary)
        assert changed.returncode == 0, changed.stdout + changed.stderr
        assert "canary" in changed.stdout
        assert "promoted" in changed.stdout
        assert served() == two.hash
        started = time.monotonic()
        back = manta(cluster, "rollback", "writer", "cluster=auto")
        seconds = time.monotonic() - started
        assert back.returncode == 0, back.stdout + back.stderr
    assert served() == one.hash
    assert f"serves writer with {one.hash[:12]} again, no longer with {two.hash[:12]}" in back.stdout
    assert {request.status for request in requests} == {200}
    print(f"manta rollback: {seconds:.1f} s, most of it to start Python and Ray's client")
    unknown = manta(cluster, "rollback", "other", "cluster=auto")
    assert unknown.returncode == 2
    assert "serves writer, not other" in unknown.stderr

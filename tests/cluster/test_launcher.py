"""The launchers' files, as far as they can be judged with no cloud: Ray's own schema, YAML, a shell's syntax."""

import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCHER = Path(__file__).parents[2] / "cluster/launcher"


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_accepts_the_cluster(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(yaml.safe_load((LAUNCHER / f"{name}.yaml").read_text()))
    validate_config(whole)
    assert whole["head_node_type"] == "head"
    assert whole["available_node_types"]["gpu"]["max_workers"] == 4
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in whole[commands][-1]


def test_kuberay_keeps_its_state_and_asks_for_a_token():
    parts = list(yaml.safe_load_all((LAUNCHER / "kuberay.yaml").read_text()))
    assert [p["kind"] for p in parts] == ["Service", "StatefulSet", "RayCluster"]
    spec = parts[2]["spec"]
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "manta-redis:6379"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_slurm_script_parses():
    subprocess.run(["bash", "-n", str(LAUNCHER / "slurm.sh")], check=True)

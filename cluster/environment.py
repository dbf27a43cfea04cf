"""The environment variables that keep Ray, MLflow, Hugging Face and DeepSpeed quiet, private and on loopback."""

from __future__ import annotations

import os
from pathlib import Path

# Wanted in the driver and in every Ray worker.
WORKER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # threads before a fork make it warn; our own processes are the parallelism
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; unset, each worker warns of it
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "GLOG_minloglevel": "2",  # errors and worse
}
DRIVER = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # Serve's threads would start a Ray of their own while this process leaves one
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables: the jobs print theirs
    "RAY_preload_python_modules": "engine.train.preload",  # read by the nodes that this process starts
}
# With this, Ray takes 127.0.0.1 for the node's address, and so all of its servers (GCS, raylet, agents, dashboard,
# workers) listen there only. `_node_ip_address="127.0.0.1"` is not enough: Ray turns it into the outer address.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def has_gpu() -> bool:
    """Say whether the machine has an NVIDIA or AMD device, by its device files: importing torch takes seconds."""
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def worker_environment() -> dict[str, str]:
    """Return the variables that Ray workers on any node need."""
    return dict(WORKER) if has_gpu() else {**WORKER, "DS_ACCELERATOR": "cpu"}


def quiet_environment() -> None:
    """Set the defaults of this process and its children; call it before Ray, DeepSpeed or MLflow are imported.

    What the user has set is left as it is.
    """
    for key, value in {**worker_environment(), **DRIVER}.items():
        os.environ.setdefault(key, value)


def importable_by_children() -> None:
    """Let the processes that this one starts, Ray's workers among them, import this project wherever it lies."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if root not in paths and Path(root).name != "site-packages":
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *paths])


def loopback_only() -> None:
    """Keep a Ray that this process starts, or joins on this machine, on 127.0.0.1. Works after `import ray` too."""
    os.environ.update(LOOPBACK)
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False

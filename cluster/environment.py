"""The environment variables that keep Ray, MLflow, Hugging Face and DeepSpeed quiet, private and on loopback."""

from __future__ import annotations

import os
from pathlib import Path

# Set in the driver and in every Ray worker.
WORKER_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # it warns of threads before a fork; the parallelism is that of our own processes
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; each worker warns if it is unset
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "GLOG_minloglevel": "2",  # errors and worse
}
DRIVER_VARIABLES = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # threads of Serve would start another Ray while this process disconnects
    "RAY_AIR_NEW_OUTPUT": "0",  # turns off Tune's tables: the jobs print their own
    "RAY_preload_python_modules": "engine.train.preload",  # read by the nodes that this process starts
}
# With this, Ray takes 127.0.0.1 for the node's address, and so all of its servers (GCS, raylet, agents, dashboard,
# workers) listen there only. `_node_ip_address="127.0.0.1"` is not enough: Ray turns it into the outer address.
LOOPBACK_VARIABLES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def has_gpu() -> bool:
    """Return whether the machine has an NVIDIA or AMD device, by its device files: importing torch takes seconds."""
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def worker_environment() -> dict[str, str]:
    """Return the environment variables of Ray workers on any node."""
    return dict(WORKER_VARIABLES) if has_gpu() else {**WORKER_VARIABLES, "DS_ACCELERATOR": "cpu"}


def set_default_environment() -> None:
    """Set the default environment of this process and its children, before Ray, DeepSpeed or MLflow are imported.

    Variables that the user has set keep their values.
    """
    for key, value in {**worker_environment(), **DRIVER_VARIABLES}.items():
        os.environ.setdefault(key, value)


def export_python_path() -> None:
    """Put this project on the PYTHONPATH of the processes that this one starts, Ray workers included."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if root not in paths and Path(root).name != "site-packages":
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *paths])


def bind_to_loopback() -> None:
    """Keep a Ray that this process starts, or joins on this machine, on 127.0.0.1. Works after `import ray` too."""
    os.environ.update(LOOPBACK_VARIABLES)
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False

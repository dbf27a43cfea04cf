"""Exports an endpoint as files: a Serve config for any Ray cluster, and a RayService for KubeRay. Starts nothing."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.serve.schema import LoggingConfig, ServeDeploySchema

from engine.bundles.bundle import Bundle
from engine.config import Config
from engine.progress import console
from engine.serve.application import CONTROLLER, ENDPOINT, make_versions
from engine.serve.deploy import endpoint_url, ingress_arguments, resolve_bundles, resolve_draft_model
from engine.serve.preflight import check_servable

SERVE_FILE, KUBERAY_FILE = "serve.yaml", "rayservice.yaml"


def export(config: Config) -> int:
    """Write both files into config.serve.export. Raises UserError for a bundle that was changed or cannot be served."""
    config = resolve_draft_model(config)
    assert config.serve.export
    folder = Path(config.serve.export)
    folder.mkdir(parents=True, exist_ok=True)
    bundles = resolve_bundles(config)
    for bundle_folder in bundles.values():
        check_servable(Bundle.open(bundle_folder), config.serve)
    exported = serve_config(config, bundles)
    ServeDeploySchema.model_validate(exported)
    (folder / SERVE_FILE).write_text(yaml.safe_dump(exported, sort_keys=False))
    service = ray_service(config, exported, len(bundles))
    (folder / KUBERAY_FILE).write_text(yaml.dump(service, Dumper=BlockStyleDumper, sort_keys=False))
    console.print(f"wrote {folder / SERVE_FILE}: for `serve deploy`, on a cluster where {', '.join(bundles)} are in the same folders")  # fmt: skip
    console.print(f"wrote {folder / KUBERAY_FILE}: for `kubectl apply -f`, once the secret and the bundles' volume exist")  # fmt: skip
    return 0


def serve_config(config: Config, bundles: dict[str, Path]) -> dict[str, Any]:
    """Return the endpoint as a Ray Serve config: an application each for the controller, the ingress and each version."""
    options, builders = config.serve, "engine.serve.application"
    versions = make_versions(bundles, options)
    initial = {
        "url": endpoint_url(options), "folder": str(config.run_dir.absolute()),
        "versions": {name: asdict(version) for name, version in versions.items()},
    }  # fmt: skip
    applications = [
        {"name": CONTROLLER, "route_prefix": None, "import_path": f"{builders}:controller_application", "args": initial},
        {"name": ENDPOINT, "route_prefix": "/", "import_path": f"{builders}:endpoint_application", "args": ingress_arguments(config)},
        *(
            {"name": version.app, "route_prefix": None, "import_path": f"{builders}:version_application",
             "args": {"name": name, "folder": version.folder, "options": version.options}}
            for name, version in versions.items()
        ),
    ]  # fmt: skip
    logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
    environment = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}  # a lost proxy is replaced after three failed checks
    return {
        "controller_options": {"runtime_env": {"env_vars": environment}},
        "http_options": {"host": options.host, "port": options.port},
        "logging_config": logging_config.model_dump(mode="json", include={"log_level", "enable_access_log"}),
        "applications": applications,
    }


def ray_service(config: Config, exported: dict[str, Any], num_bundles: int) -> dict[str, Any]:
    """Return a RayService (KubeRay 1.5 or later) whose workers fit the replicas, and a second version of each bundle."""
    options, runs_dir = config.serve, str(Path(config.runs_dir).absolute())
    cores = max(math.ceil(options.cpus_per_replica), 1)
    replica = {"cpu": str(cores), "memory": f"{4 * cores}Gi"}
    if options.gpus_per_replica:
        replica["nvidia.com/gpu"] = str(math.ceil(options.gpus_per_replica))
    pod_host = {"host": "0.0.0.0"}  # in the pod's network; clients use the Kubernetes Service
    serve_config_v2 = exported | {"http_options": exported["http_options"] | pod_host}
    workers = {
        "groupName": "replicas", "replicas": num_bundles * max(options.min_replicas, 1), "minReplicas": 0,
        "maxReplicas": 2 * num_bundles * options.max_replicas, "rayStartParams": {},
        "template": pod_template(options.image, runs_dir, "ray-worker", replica),
    }  # fmt: skip
    head = {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": pod_template(options.image, runs_dir, "ray-head", {"cpu": "2", "memory": "8Gi"}),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "manta"},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_config_v2, sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": ray.__version__,
                "enableInTreeAutoscaling": True,
                "headGroupSpec": head,
                "workerGroupSpecs": [workers],
            },
        },
    }


def pod_template(image: str, runs_dir: str, name: str, resources: dict[str, str]) -> dict[str, Any]:
    """Return a pod template; Ray's token is in the secret manta-token, the runs' folder in the volume claim manta-runs."""
    secret = {"secretKeyRef": {"name": "manta-token", "key": "auth_token"}}
    container = {
        "name": name,
        "image": image,
        "env": [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": secret},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": "DO_NOT_TRACK", "value": "true"},
        ],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": "runs", "mountPath": runs_dir}],
    }
    volumes = [{"name": "runs", "persistentVolumeClaim": {"claimName": "manta-runs"}}]
    return {"spec": {"containers": [container], "volumes": volumes}}


class BlockStyleDumper(yaml.SafeDumper):
    """Writes a string of several lines as a literal block."""


BlockStyleDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))  # fmt: skip

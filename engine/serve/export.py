"""An endpoint as files: a Serve config for any Ray cluster, and a RayService for KubeRay. Nothing is started."""

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
from engine.serve.application import ENDPOINT, STEWARD, versions_of
from engine.serve.deploy import bundles_of, of_ingress, refuse_what_cannot_serve, url_of, with_draft

SERVE, KUBERAY = "serve.yaml", "rayservice.yaml"


def export(config: Config) -> int:
    """Write both into config.serve.export. Raises UserError for a bundle that was changed, or has no endpoint."""
    config = with_draft(config)
    assert config.serve.export
    folder = Path(config.serve.export)
    folder.mkdir(parents=True, exist_ok=True)
    bundles = bundles_of(config)
    for place in bundles.values():
        refuse_what_cannot_serve(Bundle.open(place), config.serve)
    wanted = serve_config(config, bundles)
    ServeDeploySchema.model_validate(wanted)
    (folder / SERVE).write_text(yaml.safe_dump(wanted, sort_keys=False))
    (folder / KUBERAY).write_text(yaml.dump(ray_service(config, wanted, len(bundles)), Dumper=Readable, sort_keys=False))  # fmt: skip
    console.print(f"wrote {folder / SERVE}: `serve deploy` takes it, on a cluster where {', '.join(bundles)} lie in the same folders")  # fmt: skip
    console.print(f"wrote {folder / KUBERAY}: `kubectl apply -f` takes it, once the secret and the bundles' volume are there")  # fmt: skip
    return 0


def serve_config(config: Config, bundles: dict[str, Path]) -> dict[str, Any]:
    """Return the endpoint as Ray Serve's own config: an application each for the ingress, the steward and each version."""
    options, builders = config.serve, "engine.serve.application"
    versions = versions_of(bundles, options)
    beginning = {"url": url_of(options), "folder": str(config.run_dir.absolute()), "versions": {name: asdict(it) for name, it in versions.items()}}  # fmt: skip
    applications = [
        {"name": STEWARD, "route_prefix": None, "import_path": f"{builders}:steward_application", "args": beginning},
        {"name": ENDPOINT, "route_prefix": "/", "import_path": f"{builders}:endpoint_application", "args": of_ingress(config)},
        *(
            {"name": it.app, "route_prefix": None, "import_path": f"{builders}:version_application",
             "args": {"name": name, "folder": it.folder, "options": it.options}}
            for name, it in versions.items()
        ),
    ]  # fmt: skip
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    patience = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}  # a lost proxy is replaced after three looks
    return {
        "controller_options": {"runtime_env": {"env_vars": patience}},
        "http_options": {"host": options.host, "port": options.port},
        "logging_config": quiet.model_dump(mode="json", include={"log_level", "enable_access_log"}),
        "applications": applications,
    }


def ray_service(config: Config, wanted: dict[str, Any], bundles: int) -> dict[str, Any]:
    """Return a RayService (KubeRay 1.5 or later) whose workers have room for the replicas, and for a second version of each."""
    options, runs_dir = config.serve, str(Path(config.runs_dir).absolute())
    cores = max(math.ceil(options.cpus_per_replica), 1)
    replica = {"cpu": str(cores), "memory": f"{4 * cores}Gi"}
    if options.gpus_per_replica:
        replica["nvidia.com/gpu"] = str(math.ceil(options.gpus_per_replica))
    within = wanted | {
        "http_options": wanted["http_options"] | {"host": "0.0.0.0"}
    }  # of the pod; the Service is the way in
    workers = {
        "groupName": "replicas", "replicas": bundles * max(options.min_replicas, 1), "minReplicas": 0,
        "maxReplicas": 2 * bundles * options.max_replicas, "rayStartParams": {},
        "template": pod(options.image, runs_dir, "ray-worker", replica),
    }  # fmt: skip
    head = {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": pod(options.image, runs_dir, "ray-head", {"cpu": "2", "memory": "8Gi"}),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "manta"},
        "spec": {
            "serveConfigV2": yaml.safe_dump(within, sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": ray.__version__,
                "enableInTreeAutoscaling": True,
                "headGroupSpec": head,
                "workerGroupSpecs": [workers],
            },
        },
    }


def pod(image: str, runs_dir: str, name: str, resources: dict[str, str]) -> dict[str, Any]:
    """Return a pod's template: the cluster's token is in the secret manta-token, the runs' folder in the claim manta-runs."""
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


class Readable(yaml.SafeDumper):
    """Writes a text of several lines as such."""


Readable.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))  # fmt: skip

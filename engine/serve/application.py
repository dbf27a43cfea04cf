"""The endpoint's Serve applications: the ingress, the controller, and one for the replicas of each version of a model.

A version has an application of its own, so that it is added and removed while all others go on. Serve can also build each
from a config file (`engine.serve.export`): therefore the builders take plain arguments.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve

from engine.bundles.bundle import Bundle
from engine.config import INGRESS, REPLICA, ServeConfig, group, options_affecting
from engine.serve.http.api import Api
from engine.serve.http.haproxy import LoadBalancer
from engine.serve.llm.lora import pin_adapters
from engine.serve.replica import Replica
from engine.serve.routing.autoscaling import InFlightWorkPolicy, max_ongoing_requests
from engine.serve.routing.controller import Controller
from engine.serve.routing.messages import Version

ENDPOINT, CONTROLLER, BALANCER = "manta", "manta-controller", "manta-balancer"  # names of applications
HEAD_NODE = "node:__internal_head__"  # Ray's resource of the head node, where clients expect the endpoint
HEALTH_CHECK_PERIOD_S = 1.0  # of ingresses: a lost one is replaced after the next check


def ingress_options(options: ServeConfig) -> dict[str, Any]:
    """Return the options that an ingress depends on."""
    return options_affecting(options, (INGRESS, REPLICA))


def make_version(name: str, bundle: Bundle, options: ServeConfig) -> Version:
    """Return the version of a bundle that is served under a name with these options; its id is a hash of all of them."""
    own = options_affecting(options, (REPLICA,))
    own["adapters"] = pin_adapters(options.adapters)
    folder = str(bundle.folder.absolute())
    identity = [name, bundle.hash, folder, own, Bundle.open(options.draft_model).hash if options.draft_model else None]
    version_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    app = f"manta-{re.sub('[^A-Za-z0-9_-]', '-', name)}-{version_id}"
    return Version(version_id, app, bundle.hash, folder, own)


def version_application(args: dict[str, Any]) -> Any:
    """Build the replicas of a version; takes {"name", "folder", "options"}."""
    options = group(ServeConfig, args["options"], "serve.")
    max_per_node = options.max_replicas_per_node
    placement: dict[str, Any] = {"max_replicas_per_node": max_per_node} if max_per_node else {}
    with warnings.catch_warnings():  # Serve plans to read metrics_interval_s from the environment instead
        warnings.simplefilter("ignore", DeprecationWarning)
        deployment = serve.deployment(
            name=f"bundle-{args['name']}".replace("/", "-"),
            autoscaling_config=autoscaling_config(options),
            max_ongoing_requests=max_ongoing_requests(options.max_num_seqs),
            max_queued_requests=options.max_queue,
            **placement,
            graceful_shutdown_timeout_s=options.drain_s,
            health_check_period_s=options.health_check_s,
            ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
            max_constructor_retry_count=1,
        )(Replica)
    return deployment.bind(args["folder"], asdict(options))


def autoscaling_config(options: ServeConfig) -> dict[str, Any]:
    """Return Serve's autoscaling config: InFlightWorkPolicy within the options' bounds and delays."""
    targets = {"target_tokens": options.target_tokens, "target_requests": options.target_ongoing_requests}
    return {
        "min_replicas": options.min_replicas,
        "initial_replicas": max(options.min_replicas, 1),  # at least one, to verify and replay the bundle
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target_ongoing_requests,
        "metrics_interval_s": options.metrics_interval_s,
        "look_back_period_s": 3 * options.metrics_interval_s,
        "upscale_delay_s": options.upscale_delay_s,
        "downscale_delay_s": options.downscale_delay_s,
        "downscale_to_zero_delay_s": options.downscale_to_zero_delay_s,
        "policy": {
            "policy_function": f"{InFlightWorkPolicy.__module__}:{InFlightWorkPolicy.__name__}",
            "policy_kwargs": targets,
        },
    }


def endpoint_application(args: dict[str, Any]) -> Any:
    """Build the ingress; takes {"options", "access"}, and "listens" where it is reached without Serve's proxies."""
    options, listens = group(ServeConfig, args["options"], "serve."), args.get("listens", False)
    placement: dict[str, Any] = {"resources": {HEAD_NODE: 0.001}} if listens else {}
    ingress = serve.deployment(
        name="api",
        num_replicas=options.ingresses,
        max_ongoing_requests=1024,
        max_surge_percent=100,  # the new one answers before the old one stops
        graceful_shutdown_timeout_s=options.drain_s,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 0, **placement},
    )(Api)
    return ingress.bind(CONTROLLER, {key: args[key] for key in ("options", "access")}, listens)


def balancer_application(args: dict[str, Any]) -> Any:
    """Build the deployment that runs HAProxy before the ingresses; takes {"options"}."""
    options = group(ServeConfig, args["options"], "serve.")
    balancer = serve.deployment(
        name="balancer",
        graceful_shutdown_timeout_s=options.drain_s + 2,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001}},
    )(LoadBalancer)
    return balancer.bind(options.host, options.port, options.ingresses, options.body_timeout_s, options.drain_s)


def controller_application(args: dict[str, Any]) -> Any:
    """Build the controller; takes {"url", "folder", "versions"}, the versions by model."""
    controller = serve.deployment(name="controller", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})(
        Controller
    )
    return controller.bind(args["url"], args["folder"], args["versions"])


def make_versions(bundles: dict[str, Path], options: ServeConfig) -> dict[str, Version]:
    """Return the version of each bundle, by the name that it is served under."""
    return {name: make_version(name, Bundle.open(folder), options) for name, folder in bundles.items()}

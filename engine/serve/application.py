"""The endpoint's Serve applications: one that clients reach, the steward, and one for each version of a model.

A version has an application of its own, so that it comes and goes while all others go on. Serve can build each from a
config file too (`engine.serve.export`), hence the builders, which take plain arguments.
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
from engine.config import ServeConfig
from engine.serve.http.api import Api
from engine.serve.http.haproxy import Balancer
from engine.serve.llm.lora import pinned
from engine.serve.replica import Replica
from engine.serve.routing.autoscaling import InFlightWorkPolicy, max_ongoing_requests
from engine.serve.routing.controller import Controller
from engine.serve.routing.rollout import Version

ENDPOINT, STEWARD, BALANCER = "manta", "manta-steward", "manta-balancer"  # names of applications
HEAD_NODE = "node:__internal_head__"  # Ray's resource for it: where the endpoint is looked for
HEALTH_CHECK_S = 1.0  # between two looks at the ingress: a lost one is replaced after the next
# Options that decide how one deployment goes; a change of them changes neither ingress nor replicas.
OF_A_CHANGE = (
    "names", "ready_timeout_s", "detach", "strategy", "canary_stages", "canary_requests", "canary_stage_s",
    "canary_false_alarm", "canary_error_margin", "canary_latency_margin", "shadow_share", "shadow_requests",
    "keep_warm_s", "export", "image",
)  # fmt: skip
OF_THE_INGRESS = (  # replicas have no part in them
    "host", "port", "max_body_bytes", "max_audio_bytes", "tries", "body_timeout_s", "keys_file", "open", "origins", "log_prompts", "records_dir",
    "haproxy", "ingresses",
)  # fmt: skip


def settings_of_ingress(options: ServeConfig) -> dict[str, Any]:
    """Return the options by which an ingress may differ from another."""
    return {key: value for key, value in asdict(options).items() if key not in OF_A_CHANGE}


def version_of(name: str, bundle: Bundle, options: ServeConfig) -> Version:
    """Return the version that a bundle is with these options, served under a name."""
    own = {key: value for key, value in asdict(options).items() if key not in OF_A_CHANGE + OF_THE_INGRESS}
    own["adapters"] = pinned(options.adapters)
    folder = str(bundle.folder.absolute())
    whole = [name, bundle.hash, folder, own, Bundle.open(options.draft_model).hash if options.draft_model else None]
    mark = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
    app = f"manta-{re.sub('[^A-Za-z0-9_-]', '-', name)}-{mark}"
    return Version(mark, app, bundle.hash, folder, own)


def version_application(args: dict[str, Any]) -> Any:
    """Build the replicas of a version: {"name", "folder", "options"}."""
    options = ServeConfig(**args["options"])
    most = options.max_replicas_per_node
    spread: dict[str, Any] = {"max_replicas_per_node": most} if most else {}
    with warnings.catch_warnings():  # Serve means to take metrics_interval_s from each node's environment one day
        warnings.simplefilter("ignore", DeprecationWarning)
        deployment = serve.deployment(
            name=f"bundle-{args['name']}".replace("/", "-"),
            autoscaling_config=autoscaling(options),
            max_ongoing_requests=max_ongoing_requests(options.max_num_seqs),
            max_queued_requests=options.max_queue,
            **spread,
            graceful_shutdown_timeout_s=options.drain_s,
            health_check_period_s=options.health_check_s,
            ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
            max_constructor_retry_count=1,
        )(Replica)
    return deployment.bind(args["folder"], asdict(options))


def autoscaling(options: ServeConfig) -> dict[str, Any]:
    """Return Serve's autoscaling config: our policy within the options' bounds and delays."""
    targets = {"target_tokens": options.target_tokens, "target_requests": options.target_ongoing_requests}
    return {
        "min_replicas": options.min_replicas,
        "initial_replicas": max(options.min_replicas, 1),  # one at least, to verify and replay
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target_ongoing_requests,
        "metrics_interval_s": options.scale_look_s,
        "look_back_period_s": 3 * options.scale_look_s,
        "upscale_delay_s": options.scale_up_s,
        "downscale_delay_s": options.scale_down_s,
        "downscale_to_zero_delay_s": options.scale_to_zero_s,
        "policy": {
            "policy_function": f"{InFlightWorkPolicy.__module__}:{InFlightWorkPolicy.__name__}",
            "policy_kwargs": targets,
        },
    }


def endpoint_application(args: dict[str, Any]) -> Any:
    """Build the ingress: {"options", "access"}, and "listens" where it is the way in itself, without Serve's proxies."""
    options, listens = ServeConfig(**args["options"]), args.get("listens", False)
    place: dict[str, Any] = {"resources": {HEAD_NODE: 0.001}} if listens else {}
    ingress = serve.deployment(
        name="api",
        num_replicas=options.ingresses,
        max_ongoing_requests=1024,
        max_surge_percent=100,  # a changed one answers before the old one leaves
        graceful_shutdown_timeout_s=options.drain_s,
        health_check_period_s=HEALTH_CHECK_S,
        ray_actor_options={"num_cpus": 0, **place},
    )(Api)
    return ingress.bind(STEWARD, {key: args[key] for key in ("options", "access")}, listens)


def balancer_application(args: dict[str, Any]) -> Any:
    """Build what starts HAProxy, beside the ingresses: {"options"}."""
    options = ServeConfig(**args["options"])
    balancer = serve.deployment(
        name="balancer",
        graceful_shutdown_timeout_s=options.drain_s + 2,
        health_check_period_s=HEALTH_CHECK_S,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001}},
    )(Balancer)
    return balancer.bind(options.host, options.port, options.ingresses, options.body_timeout_s, options.drain_s)


def steward_application(args: dict[str, Any]) -> Any:
    """Build the steward: {"url", "folder", "versions"}, these by name."""
    steward = serve.deployment(name="steward", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})(Controller)
    return steward.bind(args["url"], args["folder"], args["versions"])


def versions_of(bundles: dict[str, Path], options: ServeConfig) -> dict[str, Version]:
    """Return the version of each bundle by the name that it is served under."""
    return {name: version_of(name, Bundle.open(folder), options) for name, folder in bundles.items()}

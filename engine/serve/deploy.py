"""Serve bundles with Ray Serve, change what is served without downtime, and take it down. Ray is up already."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import httpx

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.lineage import record_deployment
from engine.config import Config, ServeConfig, with_values
from engine.errors import UserError
from engine.progress import console
from engine.serve.http.api_keys import KEYS_VARIABLE, ApiKeys
from engine.serve.http.haproxy import haproxy_binary
from engine.serve.http.middleware import access_options
from engine.serve.jobs import ModelInfo
from engine.serve.preflight import (
    check_capacity,
    check_ingress_options_unchanged,
    check_port_is_free,
    check_servable,
)
from engine.serve.routing.messages import Version
from engine.serve.routing.rollout import RolloutPlan, latest_events
from engine.serve.routing.sequential_test import CanaryRules
from engine.serve.serve_client import (
    POLL_PERIOD_S,
    RESPONSE_TIMEOUT_S,
    call_controller,
    controller_state,
    describe_version,
    is_running,
    quiet_logging,
    run_applications,
    running_endpoint,
    wait_until_running,
)
from engine.serve.tracing import make_exporter

FOLLOW_PERIOD_S = 1.0  # between two looks at a rollout
EXIT_WITHDRAWN = 3  # exit code of a deployment whose candidate was withdrawn


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint."""

    url: str

    def stop(self) -> None:
        """Take it down."""
        from ray import serve

        from engine.serve.routing.controller import delete_state

        with contextlib.redirect_stderr(open(os.devnull, "w")):
            serve.shutdown()
            delete_state()


def deploy(config: Config, bundles: dict[str, Path]) -> Endpoint:
    """Serve each bundle under its name; return once /readyz answers 200 and the rollout of every new version has begun.

    Where an endpoint is up on this Ray cluster, it is changed: other names stay, and the stable version of a name answers
    until the new one is ready. Raises UserError, and changes nothing, for a port in use, a bundle that was changed or does
    not reproduce its recorded outputs, an adapter or draft model that does not fit it, and an address beyond loopback
    without keys.
    """
    config = resolve_draft_model(config)
    for folder in bundles.values():
        check_servable(Bundle.open(folder), config.serve)
    if config.serve.tracing:
        make_exporter(config.serve.tracing)
    if config.serve.haproxy:
        haproxy_binary()
    ingress_arguments(config)  # raises before anything starts
    quiet_logging()
    present = running_endpoint()
    endpoint = Endpoint(endpoint_url(config.serve))
    if present is None:
        check_port_is_free(config.serve.port)
    elif present.url != endpoint.url:
        port = present.url.rpartition(":")[2]
        raise UserError(
            f"an endpoint is up at {present.url}, and a cluster has one: use serve.port={port} to change it"
        )
    else:
        check_ingress_options_unchanged(config.serve, present)
    from engine.serve.application import BALANCER, make_versions

    versions = make_versions(bundles, config.serve)
    if present:
        call_controller("keep_warm", [version.app for version in versions.values()], config.serve.ready_timeout_s)
    new = {name: version for name, version in versions.items() if not is_running(version.app)}
    check_capacity(config.serve, len(new), beside_others=present is not None)
    try:
        if present is None:
            start_endpoint(config, endpoint)
        start_replicas(new, config.serve.ready_timeout_s)
        if config.serve.haproxy:
            wait_until_running([BALANCER], config.serve.ready_timeout_s)
        described = {name: replace(version, info=describe_version(version)) for name, version in versions.items()}
        call_controller("set_endpoint", endpoint.url, str(config.run_dir.absolute()), ingress_arguments(config))
        call_controller("deploy", described, rollout_plan(config.serve))
        wait_until_ready(endpoint, config.serve.ready_timeout_s)
    except BaseException:
        if present is None:
            endpoint.stop()
        raise
    record_deployment(config.run_dir, endpoint.url, bundles)
    return endpoint


def start_endpoint(config: Config, endpoint: Endpoint) -> None:
    """Start Serve, the controller and the ingress."""
    from ray import serve

    from engine.serve import application
    from engine.serve.routing.controller import delete_state

    delete_state()  # of an endpoint that was ended by other means
    serve.start(proxy_location="Disabled", logging_config=quiet_logging())  # the ingress listens itself
    initial = {"url": endpoint.url, "folder": str(config.run_dir.absolute()), "versions": {}}
    ingress = ingress_arguments(config)
    applications = {
        application.CONTROLLER: application.controller_application(initial),
        application.ENDPOINT: application.endpoint_application(ingress | {"listens": True}),
    }
    if config.serve.haproxy:
        applications[application.BALANCER] = application.balancer_application({"options": ingress["options"]})
    run_applications(applications)


def ingress_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of `endpoint_application`. Raises UserError for an address beyond loopback without keys."""
    from engine.serve.application import ingress_options

    access = access_options(config, os.environ.get(KEYS_VARIABLE, ""))
    return {"options": ingress_options(config.serve), "access": asdict(access) | {"origins": list(access.origins)}}


def start_replicas(versions: dict[str, Version], timeout_s: float) -> None:
    """Start replicas of versions and wait until each has loaded and verified its bundle and replayed its golden requests.

    Raises UserError where one fails, and deletes what was started: present versions go on.
    """
    from ray import serve

    from engine.serve.application import version_application

    if not versions:
        return
    run_applications({
        version.app: version_application({"name": name, "folder": version.folder, "options": version.options})
        for name, version in versions.items()
    })  # fmt: skip
    try:
        wait_until_running([version.app for version in versions.values()], timeout_s)
    except BaseException:
        for version in versions.values():
            serve.delete(version.app, _blocking=False)
        raise


def wait_until_ready(endpoint: Endpoint, timeout_s: float) -> None:
    """Wait until every ingress answers with the controller's present routing table. Raises UserError after `timeout_s`."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from engine.serve.application import ENDPOINT

    deadline = time.monotonic() + timeout_s
    revision = controller_state().revision
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, RayError, RayServeException, TimeoutError):
            response = httpx.get(f"{endpoint.url}/readyz", timeout=10)
            if (
                response.status_code == 200
                and int(response.headers["x-manta-table"]) >= revision
                and is_running(ENDPOINT)
            ):
                responses = serve.get_app_handle(ENDPOINT).broadcast("routing_revision")
                revisions = responses.results(timeout_s=RESPONSE_TIMEOUT_S)
                if revisions and min(revisions) >= revision:
                    return
        time.sleep(POLL_PERIOD_S)
    raise UserError(
        f"the endpoint took no traffic within {timeout_s:.0f} s: look at Ray's logs in the run's folder, "
        "or give it longer by serve.ready_timeout_s"
    )


def rollout_plan(options: ServeConfig) -> RolloutPlan:
    """Return how a new version is rolled out."""
    strategy = cast(Literal["replace", "canary", "shadow"], options.strategy)  # checked by engine.config
    rules = CanaryRules(
        tuple(options.canary_stages), options.canary_requests, options.canary_stage_s, options.canary_false_alarm
    )
    return RolloutPlan(
        strategy, rules, options.canary_error_margin, options.canary_latency_margin, options.shadow_share,
        options.shadow_requests, options.keep_warm_s,
    )  # fmt: skip


def endpoint_url(options: ServeConfig) -> str:
    """Return the endpoint's URL on this machine."""
    return f"http://{'127.0.0.1' if options.host == '0.0.0.0' else options.host}:{options.port}"


def resolve_bundles(config: Config) -> dict[str, Path]:
    """Return the folder of each bundle of config.bundle (`a+b`; the champion if empty) by the name that it is served under."""
    references = (config.bundle or config.tracking.alias).split("+")
    folders = [find_bundle(reference, Path(config.runs_dir), config.tracking_uri) for reference in references]
    if config.serve.names:
        return dict(zip(config.serve.names.split("+"), folders, strict=True))
    return {served_name(reference, folder): folder for reference, folder in zip(references, folders, strict=True)}


def resolve_draft_model(config: Config) -> Config:
    """Return the config with the folder of its draft model. Raises UserError for an unknown one."""
    if not config.serve.draft_model:
        return config
    try:
        folder = find_bundle(config.serve.draft_model, Path(config.runs_dir), config.tracking_uri)
    except UserError as error:
        raise UserError(f"serve.draft_model: {error}") from error
    return with_values(config, {"serve.draft_model": str(folder.absolute())})


def served_name(reference: str, folder: Path) -> str:
    """Return the name of a bundle: for a folder, its manifest's; else the reference without version and alias."""
    if Path(reference).is_dir():
        manifest = Bundle.open(folder).manifest
        return manifest.name if manifest else Path(reference).name
    return reference.partition("@")[0].partition("/")[0]


def serve_until_stopped(config: Config) -> int:
    """Serve config.bundle until Ctrl-C, or return at once with serve.detach. Return the exit code.

    Where an endpoint is up already, change it, follow the rollout to its end, and leave it up; the exit code is then
    EXIT_WITHDRAWN if the candidate was withdrawn.
    """
    if config.serve.detach and config.cluster.address == "local":
        raise UserError("serve.detach needs a cluster that stays up: `manta cluster up`, then cluster.address=auto")
    bundles, was_up = resolve_bundles(config), running_endpoint() is not None
    endpoint = deploy(config, bundles)
    if was_up:
        return follow_rollouts(list(bundles)) if not config.serve.detach else 0
    console.print(f"serving {', '.join(bundles)} at {endpoint.url} (interface: {endpoint.url}/docs)")
    needs_key = ApiKeys(config.keys_file, os.environ.get(KEYS_VARIABLE, "")).required
    for name, model in controller_state().models.items():
        assert model.stable.info
        console.print(f"curl {endpoint.url}/v1/{example_request(name, model.stable.info, bundles[name], needs_key)}")
    if config.serve.detach:
        console.print("it stays up: `manta cluster down` ends it")
        return 0
    console.print("Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    finally:
        endpoint.stop()


def example_request(name: str, info: ModelInfo, folder: Path, needs_key: bool) -> str:
    """Return the path of a request to a model, and curl's options for it."""
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    if info.task == "transcription":
        return f"audio/transcriptions{key} -F model={name} -F file=@speech.wav"
    path, body = "embeddings", {"input": "some text"}
    if info.task == "images":
        path, body = "images/generations", {"prompt": Bundle.open(folder).objective().labels[0]}
    elif info.task == "classification":
        path = "classify"
    elif info.task == "completion":
        path, body = "completions", {"prompt": "def "}
    return f"{path}{key} -H 'Content-Type: application/json' -d '{json.dumps({'model': name, **body})}'"


def follow_rollouts(names: Sequence[str]) -> int:
    """Print the events of these models until their rollouts end; return EXIT_WITHDRAWN if one was withdrawn, else 0."""
    num_printed: dict[str, int] = {}
    while True:
        models = controller_state().models
        for name in names:
            model = models[name]
            first = num_printed.get(name, model.num_events - 1)
            for event in latest_events(model.events, model.num_events - first):
                console.print(f"{name}  {event.event} {event.version}: {event.reason}", markup=False)
            num_printed[name] = model.num_events
        if not any(models[name].rollout for name in names):
            return EXIT_WITHDRAWN if any(models[name].events[-1].event == "withdrawn" for name in names) else 0
        time.sleep(FOLLOW_PERIOD_S)


def roll_back(config: Config, name: str) -> tuple[str, str]:
    """End a model's rollout, or else return to its previous version; return the hashes of the bundles (withdrawn, stable).

    Raises UserError where no endpoint is up, or the model has had no other version.
    """
    present = running_endpoint()
    models = controller_state().models if present else {}
    if present is None or name not in models:
        reason = f"the endpoint at {present.url} serves {', '.join(models)}, not {name}" if present else "no endpoint is up on this Ray cluster"  # fmt: skip
        raise UserError(f"{reason}: nothing can be rolled back")
    model = models[name]
    if model.rollout:
        call_controller("stop_rollout", name, "rolled back")
        withdrawn, stable = model.rollout.version.hash, model.stable.hash
    elif model.previous:
        version = model.previous[0]
        call_controller("keep_warm", [version.app], config.serve.ready_timeout_s)
        if not is_running(version.app):  # its replicas are kept for serve.keep_warm_s only
            start_replicas({name: version}, config.serve.ready_timeout_s)
        plan = replace(rollout_plan(config.serve), strategy="replace")
        call_controller("deploy", {name: version}, plan)
        withdrawn, stable = model.stable.hash, version.hash
    else:
        raise UserError(f"{name} has had one version only: nothing can be rolled back")
    wait_until_ready(Endpoint(present.url), config.serve.ready_timeout_s)
    return withdrawn, stable

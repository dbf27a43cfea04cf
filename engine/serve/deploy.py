"""Put bundles behind Ray Serve, change what is served while it serves, and take it down again. Ray is up already."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.lineage import record_deployment
from engine.config import Config, ServeConfig, with_values
from engine.errors import UserError
from engine.progress import console
from engine.serve.http.api_keys import VARIABLE, Keys
from engine.serve.http.haproxy import binary
from engine.serve.http.middleware import access_for
from engine.serve.llm.lora import refuse_unfit
from engine.serve.llm.vllm_engine import refuse_without_vllm
from engine.serve.routing.rollout import Plan, Version
from engine.serve.routing.sequential_test import Rules
from engine.serve.tracing import exporter

ASK_S = 30.0  # for the steward's answers
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint."""

    url: str

    def stop(self) -> None:
        """Take it down."""
        from ray import serve

        from engine.serve.routing.controller import forget

        with contextlib.redirect_stderr(open(os.devnull, "w")):
            serve.shutdown()
            forget()


def deploy(config: Config, bundles: dict[str, Path]) -> Endpoint:
    """Serve each bundle under its name; return once /readyz answers 200 and every new version is in, as the strategy says.

    Where an endpoint is up on this Ray already, it is changed: what it serves under other names stays, and a version that
    a name has goes on until the new one is ready. Raises UserError, and changes nothing, for a port in use, a bundle that
    was changed, one that doesn't answer as it recorded, an adapter or a draft that isn't for it, and an address beyond
    loopback without keys.
    """
    config = with_draft(config)
    for folder in bundles.values():
        refuse_what_cannot_serve(Bundle.open(folder), config.serve)
    if config.serve.tracing:
        exporter(config.serve.tracing)
    if config.serve.haproxy:
        binary()
    of_ingress(config)  # refused here, if it is, before anything starts
    quiet()
    up = running()
    endpoint = Endpoint(url_of(config.serve))
    if up is None:
        refuse_taken_port(config.serve.port)
    elif up["url"] != endpoint.url:
        port = up["url"].rpartition(":")[2]
        raise UserError(f"an endpoint is up at {up['url']}, and a cluster has one: use serve.port={port} to change it")
    else:
        refuse_other_ways_in(config.serve, up)
    from engine.serve.application import BALANCER, versions_of

    versions = versions_of(bundles, config.serve)
    if up:
        call_controller("keep", [it.app for it in versions.values()], config.serve.ready_timeout_s)
    new = {name: it for name, it in versions.items() if not is_running(it.app)}
    refuse_what_cannot_fit(config.serve, len(new), beside=up is not None)
    try:
        if up is None:
            open_endpoint(config, endpoint)
        bring_up(new, config.serve.ready_timeout_s)
        if config.serve.haproxy:
            wait_until_running([BALANCER], config.serve.ready_timeout_s)
        known = {name: asdict(replace(it, about=about(it))) for name, it in versions.items()}
        call_controller("opened", endpoint.url, str(config.run_dir.absolute()), of_ingress(config))
        call_controller("take", known, asdict(plan_of(config.serve)))
        wait_until_ready(endpoint, config.serve.ready_timeout_s)
    except BaseException:
        if up is None:
            endpoint.stop()
        raise
    record_deployment(config.run_dir, endpoint.url, bundles)
    return endpoint


def open_endpoint(config: Config, endpoint: Endpoint) -> None:
    """Start Serve, the steward and the ingress."""
    from ray import serve

    from engine.serve.application import BALANCER, ENDPOINT, STEWARD
    from engine.serve.routing.controller import forget

    forget()  # what an endpoint left that was ended by another hand
    serve.start(proxy_location="Disabled", logging_config=quiet())  # the ingress listens itself
    beginning = {"url": endpoint.url, "folder": str(config.run_dir.absolute()), "versions": {}}
    ingress = of_ingress(config)
    balancer = [("balancer", BALANCER, {"options": ingress["options"]})] if config.serve.haproxy else []
    run([("steward", STEWARD, beginning), ("endpoint", ENDPOINT, ingress | {"listens": True}), *balancer])


def of_ingress(config: Config) -> dict[str, Any]:
    """Return the arguments of the ingress' builder. Raises UserError for an address beyond loopback without keys."""
    from engine.serve.application import settings_of_ingress

    access = access_for(config, os.environ.get(VARIABLE, ""))
    return {"options": settings_of_ingress(config.serve), "access": asdict(access) | {"origins": list(access.origins)}}


def run(applications: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """Give Serve applications: (what it is, its name, the arguments of its builder)."""
    from ray import serve

    from engine.serve import application

    builders = {
        "steward": application.steward_application, "endpoint": application.endpoint_application,
        "version": application.version_application, "balancer": application.balancer_application,
    }  # fmt: skip
    targets = [
        serve.RunTarget(builders[what](args), name=name, route_prefix="/" if what == "endpoint" else None, logging_config=quiet())
        for what, name, args in applications
    ]  # fmt: skip
    serve.run_many(targets, wait_for_applications_running=False)


def bring_up(versions: dict[str, Version], timeout_s: float) -> None:
    """Start the replicas of versions and wait until each has loaded, verified and replayed.

    Raises UserError where one doesn't, and takes off what was begun: what answers till then goes on.
    """
    from ray import serve

    if not versions:
        return
    run([("version", it.app, {"name": name, "folder": it.folder, "options": it.options}) for name, it in versions.items()])  # fmt: skip
    try:
        wait_until_running([it.app for it in versions.values()], timeout_s)
    except BaseException:
        for version in versions.values():
            serve.delete(version.app, _blocking=False)
        raise


def wait_until_running(apps: Sequence[str], timeout_s: float) -> None:
    """Wait for applications. Raises UserError, with the reason, where one fails, and after `timeout_s`."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while not all(is_running(app) for app in apps):
        applications = serve.status().applications
        for app in apps:
            found = applications.get(app)
            if found and found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                messages = [it.message for it in found.deployments.values()]
                raise UserError(f"the endpoint did not start: {reason_in(' '.join([*messages, found.message]))}")
        if time.monotonic() > deadline:
            raise UserError(
                f"the replicas were not ready within {timeout_s:.0f} s: look at Ray's logs in the run's folder, "
                "or give them longer by serve.ready_timeout_s"
            )
        time.sleep(LOOK_EVERY_S)


def wait_until_ready(endpoint: Endpoint, timeout_s: float) -> None:
    """Wait until the endpoint answers, and each ingress by the steward's present table. Raises UserError after `timeout_s`."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from engine.serve.application import ENDPOINT

    deadline = time.monotonic() + timeout_s
    number = call_controller("state")["number"]
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, RayError, RayServeException, TimeoutError):
            answer = httpx.get(f"{endpoint.url}/readyz", timeout=10)
            if answer.status_code == 200 and int(answer.headers["x-manta-table"]) >= number and is_running(ENDPOINT):
                known = serve.get_app_handle(ENDPOINT).broadcast("table").results(timeout_s=ASK_S)
                if known and min(known) >= number:
                    return
        time.sleep(LOOK_EVERY_S)
    raise UserError(
        f"the endpoint took no traffic within {timeout_s:.0f} s: look at Ray's logs in the run's folder, "
        "or give it longer by serve.ready_timeout_s"
    )


def running() -> dict[str, Any] | None:
    """Return the {"url", "folder", "options"} of the endpoint that is up on this Ray; None where none is."""
    from ray import serve

    from engine.serve.application import ENDPOINT, STEWARD

    applications = serve.status().applications
    return call_controller("about") if {ENDPOINT, STEWARD} <= applications.keys() else None


def is_running(app: str) -> bool:
    """Tell whether an application is there and answers."""
    from ray import serve

    found = serve.status().applications.get(app)
    return found is not None and found.status == "RUNNING"


def call_controller(question: str, *words: Any) -> Any:
    """Ask the steward; one that was just lost is asked again, until another is there. Raises UserError where none comes."""
    from ray import serve
    from ray.exceptions import RayActorError

    from engine.serve.application import STEWARD

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deadline = time.monotonic() + ASK_S
    while time.monotonic() < deadline:
        with contextlib.suppress(RayActorError, TimeoutError):
            return getattr(serve.get_app_handle(STEWARD), question).remote(*words).result(timeout_s=ASK_S)
        time.sleep(LOOK_EVERY_S)
    raise UserError("the endpoint's steward does not answer: look at Ray's logs in the run's folder")


def about(version: Version) -> dict[str, Any]:
    """Ask a version's replica what it is."""
    from ray import serve

    found: dict[str, Any] = serve.get_app_handle(version.app).describe.remote().result(timeout_s=ASK_S)
    return found


def plan_of(options: ServeConfig) -> Plan:
    """Return how a new version is brought in."""
    rules = Rules(tuple(options.canary_stages), options.canary_requests, options.canary_stage_s, options.canary_false_alarm)  # fmt: skip
    return Plan(
        options.strategy, rules, options.canary_error_margin, options.canary_latency_margin, options.shadow_share,
        options.shadow_requests, options.keep_warm_s,
    )  # fmt: skip


def url_of(options: ServeConfig) -> str:
    """Return where the endpoint is found from this machine."""
    return f"http://{'127.0.0.1' if options.host == '0.0.0.0' else options.host}:{options.port}"


def quiet() -> Any:
    """Return a logging config without a line for each request; and silence what Serve says on this process's terminal."""
    from ray.serve.schema import LoggingConfig

    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def refuse_what_cannot_serve(bundle: Bundle, options: ServeConfig) -> None:
    """Raise UserError for a bundle that was changed, is for a task that the endpoint doesn't offer, or not for these options."""
    bundle.verify()
    objective = bundle.objective()
    if not objective.servable:
        raise UserError(
            f"{bundle.folder} is for {objective.options.name}, which the endpoint doesn't offer: load it with transformers, or "
            "measure it with manta evaluate"
        )
    if options.compile and objective.auto_class != "AutoModelForCausalLM":
        raise UserError(f"serve.compile is for bundles that write, and {bundle.folder} is for {objective.options.name}")
    if options.quantize != "none" and objective.data_kind not in ("text", "labelled"):
        raise UserError(
            f"serve.quantize is for bundles that read or write text, and {bundle.folder} is for {objective.options.name}"
        )
    if options.generator == "vllm":
        if objective.auto_class != "AutoModelForCausalLM":
            raise UserError(
                f"serve.generator=vllm is for bundles that write, and {bundle.folder} is for {objective.options.name}: deploy it "
                "without"
            )
        refuse_without_vllm(options)
    refuse_unfit(bundle, options.adapters)
    if options.draft_model:
        from engine.serve.llm.speculative import refuse_unfit_draft  # and so torch's compiler: two seconds

        refuse_unfit_draft(bundle, options.draft_model)


def refuse_taken_port(port: int) -> None:
    """Raise UserError, naming who holds the port and the next free one, if it is in use."""
    taken = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    if port in taken:
        free = next(other for other in range(port + 1, 65536) if other not in taken)
        pid = taken[port]
        holder = "another user's process"
        with contextlib.suppress(psutil.Error):  # it may have ended since
            holder = f"{psutil.Process(pid).name()}, process {pid}" if pid else holder
        raise UserError(f"serve.port {port} is in use by {holder}: use serve.port={free}")


def refuse_other_ways_in(options: ServeConfig, up: dict[str, Any]) -> None:
    """Raise UserError where the endpoint that is up differs in what HAProxy, or its absence, was started with."""
    has = up["options"].get("options", {})
    for name in ("haproxy", "ingresses", *(["body_timeout_s"] if options.haproxy else [])):
        there = has.get(name, getattr(ServeConfig(), name))
        if there != getattr(options, name):
            raise UserError(
                f"the endpoint at {up['url']} has serve.{name}={str(there).lower()}, which can't change while it is up: say the "
                "same, or take it down first"
            )


def refuse_what_cannot_fit(options: ServeConfig, versions: int, beside: bool) -> None:
    """Raise UserError where new versions ask for more than the cluster has, or has left; Serve would wait for ever.

    `beside`: others serve already, and go on until the new ones are ready.
    """
    import ray

    has, replicas = (
        ray.available_resources() if beside else ray.cluster_resources(),
        versions * max(options.min_replicas, 1),
    )
    for kind, each, key in (("cores", options.cpus_per_replica, "CPU"), ("GPUs", options.gpus_per_replica, "GPU")):
        if each * replicas > has.get(key, 0.0) + 1e-6:
            left = " left beside the version that answers until then" if beside else ""
            raise UserError(
                f"{replicas} replicas x {each:g} {kind} are asked, the cluster has {has.get(key, 0.0):g} {kind}{left}: "
                f"use fewer serve.min_replicas or a smaller serve.{key.lower()}s_per_replica"
            )


def reason_in(message: str) -> str:
    """Find the sentence of a UserError in what Serve says of a failed replica."""
    for line in message.replace("\\n", "\n").splitlines():
        if "UserError:" in line:
            return line.split("UserError:", 1)[1].strip()
    return message.strip().splitlines()[-1] if message.strip() else "no reason was given"


def bundles_of(config: Config) -> dict[str, Path]:
    """Return the folder of each bundle that the config names (`a+b`; the champion if none) by the name that it is served under."""
    references = (config.bundle or config.tracking.alias).split("+")
    folders = [find_bundle(reference, Path(config.runs_dir), config.tracking_uri) for reference in references]
    if config.serve.names:
        return dict(zip(config.serve.names.split("+"), folders, strict=True))
    return {name_of(reference, folder): folder for reference, folder in zip(references, folders, strict=True)}


def with_draft(config: Config) -> Config:
    """Return the config with the folder of its draft. Raises UserError where there is none that is called so."""
    if not config.serve.draft_model:
        return config
    try:
        folder = find_bundle(config.serve.draft_model, Path(config.runs_dir), config.tracking_uri)
    except UserError as error:
        raise UserError(f"serve.draft_model: {error}") from error
    return with_values(config, {"serve.draft_model": str(folder.absolute())})


def name_of(reference: str, folder: Path) -> str:
    """Return the name of a bundle: of a folder, what its manifest says; else the reference without version and alias."""
    if Path(reference).is_dir():
        manifest = Bundle.open(folder).manifest
        return manifest.name if manifest else Path(reference).name
    return reference.partition("@")[0].partition("/")[0]


def serve_until_stopped(config: Config) -> int:
    """Serve config.bundle until Ctrl-C; with serve.detach, return at once and leave it up. Return the exit code.

    Where an endpoint is up already, change it, follow what is tried to its end, and leave it up: 3 if it was withdrawn.
    """
    if config.serve.detach and config.cluster.address == "local":
        raise UserError("serve.detach needs a cluster that stays up: `manta cluster up`, then cluster.address=auto")
    bundles, changed = bundles_of(config), running() is not None
    endpoint = deploy(config, bundles)
    if changed:
        return follow(list(bundles)) if not config.serve.detach else 0
    console.print(f"serving {', '.join(bundles)} at {endpoint.url} (interface: {endpoint.url}/docs)")
    keyed = Keys(config.keys_file, os.environ.get(VARIABLE, "")).required
    for name, it in call_controller("state")["models"].items():
        console.print(f"curl {endpoint.url}/v1/{example(name, it['stable']['about'], bundles[name], keyed)}")
    if config.serve.detach:
        console.print("it stays up: `manta cluster down` ends it")
        return 0
    console.print("Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    finally:
        endpoint.stop()


def example(name: str, about: dict[str, Any], folder: Path, keyed: bool) -> str:
    """Return the path of a request to a model, and curl's options for it."""
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    if about["task"] == "transcription":
        return f"audio/transcriptions{key} -F model={name} -F file=@speech.wav"
    path, body = "embeddings", {"input": "some text"}
    if about["task"] == "images":
        path, body = "images/generations", {"prompt": Bundle.open(folder).objective().labels[0]}
    elif about["task"] == "classification":
        path = "classify"
    elif about["task"] == "completion":
        path, body = "completions", {"prompt": "def "}
    return f"{path}{key} -H 'Content-Type: application/json' -d '{json.dumps({'model': name, **body})}'"


def follow(names: Sequence[str]) -> int:
    """Print what happens to what is tried under these names until nothing is; return 3 if a version was withdrawn, else 0."""
    seen: dict[str, int] = {}
    while True:
        models = call_controller("state")["models"]
        for name in names:
            new = models[name]["told"] - seen.get(name, models[name]["told"] - 1)
            for event in models[name]["events"][-new:] if new else []:
                console.print(f"{name}  {event['event']} {event['version']}: {event['reason']}", markup=False)
            seen[name] = models[name]["told"]
        if not any(models[name]["trial"] for name in names):
            return 3 if any(models[name]["events"][-1]["event"] == "withdrawn" for name in names) else 0
        time.sleep(1)


def roll_back(config: Config, name: str) -> tuple[str, str]:
    """Let the version before answer again, or end what is tried; return the hashes of the bundles (taken off, that answers).

    Raises UserError where no endpoint is up, or the name has had no other version.
    """
    up = running()
    models = call_controller("state")["models"] if up else {}
    if up is None or name not in models:
        there = (
            f"the endpoint at {up['url']} serves {', '.join(models)}, not {name}"
            if up
            else "no endpoint is up on this Ray"
        )
        raise UserError(f"{there}: nothing can be rolled back")
    model = models[name]
    if model["trial"]:
        call_controller("stop_trial", name, "rolled back")
        gone, back = model["trial"]["version"]["hash"], model["stable"]["hash"]
    elif model["before"]:
        version = Version(**model["before"][0])
        call_controller("keep", [version.app], config.serve.ready_timeout_s)
        if not is_running(version.app):  # it was kept warm for a while only
            bring_up({name: version}, config.serve.ready_timeout_s)
        plan = replace(plan_of(config.serve), strategy="replace")
        call_controller("take", {name: asdict(version)}, asdict(plan))
        gone, back = model["stable"]["hash"], version.hash
    else:
        raise UserError(f"{name} has had one version only: there is none before it")
    wait_until_ready(Endpoint(up["url"]), config.serve.ready_timeout_s)
    return gone, back

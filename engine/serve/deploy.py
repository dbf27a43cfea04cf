"""Put bundles behind Ray Serve, wait until they take traffic, and take them down again. Ray is up already."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.lineage import record_deployment
from engine.config import Config, ServeConfig
from engine.errors import UserError
from engine.progress import console
from engine.serve.gate import Access, access_for
from engine.serve.keys import VARIABLE

APPLICATION = "manta"


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint."""

    url: str

    def stop(self) -> None:
        """Take it down."""
        from ray import serve

        with contextlib.redirect_stderr(open(os.devnull, "w")):
            serve.shutdown()


def deploy(config: Config, bundles: dict[str, Path]) -> Endpoint:
    """Serve each bundle under its name; return once /readyz answers 200.

    Raises UserError for a port in use, a bundle that was changed, one that doesn't answer as it recorded, and an address
    beyond loopback without keys.
    """
    refuse_taken_port(config.serve.port)
    refuse_what_cannot_fit(config.serve, len(bundles))
    for folder in bundles.values():
        refuse_what_has_no_endpoint(Bundle.open(folder))
    access = access_for(config, os.environ.get(VARIABLE, ""))
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    host = "127.0.0.1" if config.serve.host == "0.0.0.0" else config.serve.host
    endpoint = Endpoint(f"http://{host}:{config.serve.port}")
    try:
        serve.start(http_options=HTTPOptions(host=config.serve.host, port=config.serve.port), logging_config=quiet)
        target = serve.RunTarget(
            application(config.serve, bundles, access), name=APPLICATION, route_prefix="/", logging_config=quiet
        )
        serve.run_many([target], wait_for_applications_running=False)
        wait_until_ready(endpoint, config.serve.ready_timeout_s)
    except BaseException:
        endpoint.stop()
        raise
    record_deployment(config.run_dir, endpoint.url, bundles)
    return endpoint


def application(options: ServeConfig, bundles: dict[str, Path], access: Access) -> Any:
    """Return the Serve application: an ingress, and a deployment of autoscaling replicas for each bundle."""
    from ray import serve

    from engine.serve.api import Api
    from engine.serve.replica import Replica

    handles = {}
    for number, (name, folder) in enumerate(bundles.items()):
        deployment = serve.deployment(
            name=f"bundle-{number}-{name}".replace("/", "-"),
            autoscaling_config={
                "min_replicas": options.min_replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.target_ongoing_requests,
            },
            max_ongoing_requests=4 * options.max_batch,
            max_queued_requests=options.max_queue,
            ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
            max_constructor_retry_count=1,
        )(Replica)
        handles[name] = deployment.bind(str(folder.absolute()), asdict(options))
    ingress = serve.deployment(name="api", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})(Api)
    return ingress.bind(handles, asdict(options), access)


def refuse_what_has_no_endpoint(bundle: Bundle) -> None:
    """Raise UserError for a bundle that was changed, or is for a task that the endpoint doesn't offer."""
    bundle.verify()
    objective = bundle.objective()
    if not objective.served:
        raise UserError(
            f"{bundle.folder} is for {objective.options.name}, which the endpoint doesn't offer: load it with transformers, or "
            "measure it with manta evaluate"
        )


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


def refuse_what_cannot_fit(options: ServeConfig, bundles: int) -> None:
    """Raise UserError where the least number of replicas asks for more than the cluster has; Serve would wait for ever."""
    import ray

    has, replicas = ray.cluster_resources(), bundles * options.min_replicas
    for kind, each, key in (("cores", options.cpus_per_replica, "CPU"), ("GPUs", options.gpus_per_replica, "GPU")):
        if each * replicas > has.get(key, 0.0) + 1e-6:
            raise UserError(
                f"{replicas} replicas x {each:g} {kind} are asked, the cluster has {has.get(key, 0.0):g} {kind}: "
                f"use fewer serve.min_replicas or a smaller serve.{key.lower()}s_per_replica"
            )


def wait_until_ready(endpoint: Endpoint, timeout_s: float) -> None:
    """Ask /readyz until it answers 200. Raises UserError when a replica fails, and after `timeout_s`."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        application = serve.status().applications.get(APPLICATION)
        if application and application.status == "DEPLOY_FAILED":
            told = [deployment.message for deployment in application.deployments.values()]
            raise UserError(f"the endpoint did not start: {reason_in(' '.join([*told, application.message]))}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{endpoint.url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise UserError(
        f"the endpoint took no traffic within {timeout_s:.0f} s: look at Ray's logs in the run's folder, "
        "or give it longer by serve.ready_timeout_s"
    )


def reason_in(message: str) -> str:
    """Find the sentence of a UserError in what Serve says of a failed replica."""
    for line in message.replace("\\n", "\n").splitlines():
        if "UserError:" in line:
            return line.split("UserError:", 1)[1].strip()
    return message.strip().splitlines()[-1] if message.strip() else "no reason was given"


def bundles_of(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield (name, folder) of each bundle that the config names (`a+b`); the champion if it names none."""
    for reference in (config.bundle or config.tracking.alias).split("+"):
        folder = find_bundle(reference, Path(config.runs_dir), config.tracking_uri)
        manifest = Bundle.open(folder).manifest
        yield (manifest.name if manifest and Path(reference).is_dir() else Path(reference).name), folder


def serve_until_stopped(config: Config) -> None:
    """Serve config.bundle until Ctrl-C; with serve.detach, return at once and leave it up."""
    if config.serve.detach and config.cluster.address == "local":
        raise UserError("serve.detach needs a cluster that stays up: `manta cluster up`, then cluster.address=auto")
    bundles = dict(bundles_of(config))
    endpoint = deploy(config, bundles)
    console.print(f"serving {', '.join(bundles)} at {endpoint.url} (interface: {endpoint.url}/docs)")
    models = httpx.get(f"{endpoint.url}/v1/models", timeout=30).json()["data"]
    for model in models:
        path, body = (
            ("classify", {"input": "some text"})
            if model["task"] == "classification"
            else ("completions", {"prompt": "def "})
        )
        console.print(
            f"curl {endpoint.url}/v1/{path} -H 'Content-Type: application/json' -d '{json.dumps({'model': model['id'], **body})}'"
        )
    if config.serve.detach:
        console.print("it stays up: `manta cluster down` ends it")
        return
    console.print("Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    finally:
        endpoint.stop()

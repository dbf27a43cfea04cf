"""Talks to Ray Serve and the rollout controller, from the process of a command. Ray is up already."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from engine.serve.jobs import ModelInfo
from engine.serve.routing.messages import EndpointState, Version

if TYPE_CHECKING:
    from engine.serve.routing.controller import ControllerState

RESPONSE_TIMEOUT_S = 30.0  # of the controller, and of a replica that is ready
POLL_PERIOD_S = 0.1


def quiet_logging() -> Any:
    """Return a Serve logging config without a line for each request, and silence Serve's messages in this process."""
    from ray.serve.schema import LoggingConfig

    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def run_applications(applications: Mapping[str, Any]) -> None:
    """Deploy built Serve applications, by name, without waiting for them."""
    from ray import serve

    from engine.serve.application import ENDPOINT

    targets = [
        serve.RunTarget(application, name=name, route_prefix="/" if name == ENDPOINT else None, logging_config=quiet_logging())
        for name, application in applications.items()
    ]  # fmt: skip
    serve.run_many(targets, wait_for_applications_running=False)


def wait_until_running(apps: Sequence[str], timeout_s: float) -> None:
    """Wait for applications. Raises UserError, with the reason, where one fails, and after `timeout_s`."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    while not all(is_running(app) for app in apps):
        applications = serve.status().applications
        for app in apps:
            status = applications.get(app)
            if status and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                messages = [deployment.message for deployment in status.deployments.values()]
                raise UserError(f"the endpoint did not start: {failure_reason(' '.join([*messages, status.message]))}")
        if time.monotonic() > deadline:
            raise UserError(
                f"the replicas were not ready within {timeout_s:.0f} s: look at Ray's logs in the run's folder, "
                "or give them longer by serve.ready_timeout_s"
            )
        time.sleep(POLL_PERIOD_S)


def is_running(app: str) -> bool:
    """Tell whether an application is deployed and healthy."""
    from ray import serve

    status = serve.status().applications.get(app)
    return status is not None and status.status == "RUNNING"


def failure_reason(message: str) -> str:
    """Return the sentence of a UserError in Serve's message about a failed replica, else the message's last line."""
    for line in message.replace("\\n", "\n").splitlines():
        if "UserError:" in line:
            return line.split("UserError:", 1)[1].strip()
    return message.strip().splitlines()[-1] if message.strip() else "no reason was given"


def describe_version(version: Version) -> ModelInfo:
    """Ask a replica of a version what its model is and can do."""
    from ray import serve

    info: ModelInfo = serve.get_app_handle(version.app).describe.remote().result(timeout_s=RESPONSE_TIMEOUT_S)
    return info


def call_controller(method: str, *args: Any) -> Any:
    """Call the controller, again if it was just lost, until it is restarted. Raises UserError where it does not answer."""
    from ray import serve
    from ray.exceptions import RayActorError

    from engine.serve.application import CONTROLLER

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deadline = time.monotonic() + RESPONSE_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(RayActorError, TimeoutError):
            handle = serve.get_app_handle(CONTROLLER)
            return getattr(handle, method).remote(*args).result(timeout_s=RESPONSE_TIMEOUT_S)
        time.sleep(POLL_PERIOD_S)
    raise UserError("the endpoint's controller does not answer: look at Ray's logs in the run's folder")


def controller_state() -> ControllerState:
    """Return the endpoint's state: versions, rollouts and events of each model."""
    state: ControllerState = call_controller("get_state")
    return state


def running_endpoint() -> EndpointState | None:
    """Return the endpoint that is up on this Ray cluster; None where there is none."""
    from ray import serve

    from engine.serve.application import CONTROLLER, ENDPOINT

    is_up = {ENDPOINT, CONTROLLER} <= serve.status().applications.keys()
    return controller_state().endpoint if is_up else None

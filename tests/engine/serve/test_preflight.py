"""Checks before a deployment, and the reason that Serve gives for one that failed."""

from __future__ import annotations

import pytest

from engine.config import ServeConfig
from engine.errors import UserError
from engine.serve.preflight import check_ingress_options_unchanged
from engine.serve.routing.messages import EndpointState
from engine.serve.serve_client import failure_reason


def test_options_of_haproxy_stay_while_the_endpoint_is_up() -> None:
    present = EndpointState("http://localhost:1", "/run", {"options": {"haproxy": True, "ingresses": 2, "body_timeout_s": 5}})  # fmt: skip
    check_ingress_options_unchanged(ServeConfig(haproxy=True, ingresses=2, body_timeout_s=5), present)
    for options, value in (
        (ServeConfig(), "serve.haproxy=true"),
        (ServeConfig(haproxy=True, ingresses=3, body_timeout_s=5), "serve.ingresses=2"),
        (ServeConfig(haproxy=True, ingresses=2, body_timeout_s=6), "serve.body_timeout_s=5"),
    ):
        with pytest.raises(UserError, match=f"http://localhost:1 has {value}, which can't change while it is up"):
            check_ingress_options_unchanged(options, present)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Traceback\\n  File\\nengine.errors.UserError: the bundle was changed\\nThe above", "the bundle was changed"),
        ("first\nlast line ", "last line"),
        (" ", "no reason was given"),
    ],
)
def test_reason_is_found_in_serves_message(message: str, reason: str) -> None:
    assert failure_reason(message) == reason

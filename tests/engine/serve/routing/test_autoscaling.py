"""How many replicas the work in flight needs: the policy alone, and an endpoint that scales."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from engine.config import Config, with_values
from engine.serve.deploy import deploy
from engine.serve.routing.autoscaling import IPC_REQUESTS, TOKENS_IN_FLIGHT, InFlightWorkPolicy, desired_replicas
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import background_load, wait_for
from tests.ports import free_port


@pytest.mark.parametrize(
    ("tokens", "requests", "queued", "replicas"),
    [
        (0, 0, 0, 0),
        (2000, 4, 0, 2),  # few long requests: by tokens
        (100, 40, 0, 5),  # many short requests: by requests
        (2000, 8, 4, 4),  # half of them wait, assumed to be as long
        (0, 6, 6, 0.75),  # none is taken yet: by requests
    ],
)
def test_policy_scales_with_tokens_and_requests(tokens: float, requests: float, queued: float, replicas: float) -> None:
    assert desired_replicas(tokens, requests, queued, target_tokens=1000, target_requests=8) == replicas
    metrics = {TOKENS_IN_FLIGHT: {"replica 1": tokens / 4, "replica 2": 3 * tokens / 4}}
    context = SimpleNamespace(aggregated_metrics=metrics, total_num_requests=requests, total_queued_requests=queued)
    assert InFlightWorkPolicy(1000, 8)(context) == (replicas, {})
    # The same, where Serve sees only those that wait: the others came by sockets.
    metrics[IPC_REQUESTS] = {"replica 1": requests - queued}
    context = SimpleNamespace(aggregated_metrics=metrics, total_num_requests=queued, total_queued_requests=queued)
    assert InFlightWorkPolicy(1000, 8)(context) == (replicas, {})


def replicas_of(app: str) -> int:
    from ray import serve

    (deployment,) = serve.status().applications[app].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_endpoint_scales_up_and_to_zero(ray: None, tiny: Config, tmp_path: Path) -> None:
    """Clients with long texts are more work than the 40 tokens that a replica should have; then there are no requests."""
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    values: dict[str, Any] = {
        "serve.port": free_port(), "serve.min_replicas": 0, "serve.max_replicas": 2, "serve.target_tokens": 40,
        "serve.metrics_interval_s": 0.5, "serve.upscale_delay_s": 0.5, "serve.downscale_delay_s": 1.0, "serve.downscale_to_zero_delay_s": 1.0,
        "name": "scaling",
    }  # fmt: skip
    up = deploy(with_values(tiny, values), {"writer": bundle.folder})
    try:
        from engine.serve.serve_client import controller_state

        app = controller_state().models["writer"].stable.app
        body = {"prompt": "import os", "max_tokens": 110, "logit_bias": {"0": -100}}
        with background_load(up.url, body, clients=4) as noted:
            wait_for(lambda: replicas_of(app) == 2)
        wait_for(lambda: replicas_of(app) == 0)
        assert httpx.get(f"{up.url}/readyz").status_code == 200
        assert replicas_of(app) == 0
        began = time.monotonic()
        answer = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60)
        print(f"from zero replicas to the first response: {time.monotonic() - began:.1f} s")
        assert answer.status_code == 200
        assert {it.status for it in noted} == {200}
    finally:
        up.stop()

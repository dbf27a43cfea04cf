"""The exported configs: Ray's own schema takes one, and the endpoint runs from it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.serve.deploy import Endpoint
from engine.serve.export import KUBERAY, SERVE, export
from tests.engine.bundles.making import fresh_bundle
from tests.engine.serve.clients import wait_for
from tests.ports import free_port


@pytest.fixture
def written(tiny: Config, tmp_path: Path) -> tuple[Config, Bundle, Path]:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    options = {"serve.export": str(tmp_path / "out"), "serve.port": free_port(), "serve.max_replicas": 3, "serve.names": "w",
               "serve.gpus_per_replica": 2.0, "bundle": str(bundle.folder), "runs_dir": str(tmp_path), "name": "exported"}  # fmt: skip
    config = with_values(tiny, options)
    assert export(config) == 0
    return config, bundle, tmp_path / "out"


def test_kuberay_gets_the_same(written: tuple[Config, Bundle, Path]) -> None:
    config, _, folder = written
    service = yaml.safe_load((folder / KUBERAY).read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    within = yaml.safe_load(service["spec"]["serveConfigV2"])
    alone = yaml.safe_load((folder / SERVE).read_text())
    assert within["applications"] == alone["applications"]
    assert (within["http_options"]["host"], alone["http_options"]["host"]) == ("0.0.0.0", "127.0.0.1")
    ServeDeploySchema.model_validate(within)
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["maxReplicas"]) == (1, 6)
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert container["volumeMounts"] == [{"name": "runs", "mountPath": config.runs_dir}]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"


@pytest.mark.slow
def test_the_endpoint_runs_from_the_serve_config(ray: None, written: tuple[Config, Bundle, Path]) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client

    from engine.serve.routing.controller import forget

    config, bundle, folder = written
    assert export(with_values(config, {"serve.gpus_per_replica": 0.0})) == 0
    wanted = ServeDeploySchema.model_validate(yaml.safe_load((folder / SERVE).read_text()))
    forget()
    up = Endpoint(f"http://127.0.0.1:{config.serve.port}")
    try:
        serve.start(http_options={"host": wanted.http_options.host, "port": wanted.http_options.port})
        _get_global_client().deploy_apps(wanted)

        def ready() -> bool:
            try:
                return httpx.get(f"{up.url}/readyz", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(ready, 240)
        (model,) = httpx.get(f"{up.url}/v1/models").json()["data"]
        assert (model["id"], model["hash"]) == ("w", bundle.hash)
        answer = httpx.post(f"{up.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        up.stop()

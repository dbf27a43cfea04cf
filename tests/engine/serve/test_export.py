"""The exported configs: valid by Ray's own schema, and an endpoint that runs from one."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.serve.deploy import Endpoint
from engine.serve.export import KUBERAY_FILE, SERVE_FILE, export
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import wait_for
from tests.ports import free_port


@pytest.fixture
def exported(tiny: Config, tmp_path: Path) -> tuple[Config, Bundle, Path]:
    bundle = fresh_bundle(tiny, tmp_path / "writer" / "bundle")
    options = {"serve.export": str(tmp_path / "out"), "serve.port": free_port(), "serve.max_replicas": 3, "serve.names": "w",
               "serve.gpus_per_replica": 2.0, "bundle": str(bundle.folder), "runs_dir": str(tmp_path), "name": "exported"}  # fmt: skip
    config = with_values(tiny, options)
    assert export(config) == 0
    return config, bundle, tmp_path / "out"


def test_kuberay_gets_the_same_applications(exported: tuple[Config, Bundle, Path]) -> None:
    config, _, folder = exported
    service = yaml.safe_load((folder / KUBERAY_FILE).read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    in_cluster = yaml.safe_load(service["spec"]["serveConfigV2"])
    serve_config = yaml.safe_load((folder / SERVE_FILE).read_text())
    assert in_cluster["applications"] == serve_config["applications"]
    assert (in_cluster["http_options"]["host"], serve_config["http_options"]["host"]) == ("0.0.0.0", "127.0.0.1")
    ServeDeploySchema.model_validate(in_cluster)
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["maxReplicas"]) == (1, 6)
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert container["volumeMounts"] == [{"name": "runs", "mountPath": config.runs_dir}]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"


@pytest.mark.slow
def test_endpoint_runs_from_the_serve_config(ray: None, exported: tuple[Config, Bundle, Path]) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client

    from engine.serve.routing.controller import delete_state

    config, bundle, folder = exported
    assert export(with_values(config, {"serve.gpus_per_replica": 0.0})) == 0
    schema = ServeDeploySchema.model_validate(yaml.safe_load((folder / SERVE_FILE).read_text()))
    delete_state()
    endpoint = Endpoint(f"http://127.0.0.1:{config.serve.port}")
    try:
        serve.start(http_options={"host": schema.http_options.host, "port": schema.http_options.port})
        _get_global_client().deploy_apps(schema)

        def is_ready() -> bool:
            try:
                return httpx.get(f"{endpoint.url}/readyz", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(is_ready, 240)
        (model,) = httpx.get(f"{endpoint.url}/v1/models").json()["data"]
        assert (model["id"], model["hash"]) == ("w", bundle.hash)
        response = httpx.post(f"{endpoint.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=60)
        assert response.json()["usage"]["completion_tokens"] == 3
    finally:
        endpoint.stop()

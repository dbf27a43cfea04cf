"""Images over HTTP, by OpenAI's own client: they depend on label and seed alone, not on the batch."""

from __future__ import annotations

import base64
import io
import json
import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from engine.bundles.bundle import Bundle, BundleInfo, write_bundle
from engine.config import Config, with_values
from engine.data.processor import new_image_processor
from engine.models.build import build_model
from engine.objectives.contract import objective_class
from engine.serve.deploy import Endpoint, deploy, example_request
from engine.serve.serve_client import controller_state
from tests.engine.serve.clients import wait_for
from tests.ports import free_port

LABELS = ["cat", "dog", "plane"]
DIT = {
    "model.type": "dit", "model.num_key_value_heads": None, "model.max_position_embeddings": None,
    "model.tie_word_embeddings": None, "model.intermediate_size": None, "model.options": {"patch_size": 4},
    "objective.name": "diffusion", "objective.sampling_steps": 5,
}  # fmt: skip


def random_bundle(tiny: Config, folder: Path) -> Bundle:
    """Write a bundle that generates images of 16 x 16, with random weights in all layers."""
    config = with_values(tiny, DIT)
    kind = objective_class("diffusion")
    objective: Any = kind(config.objective, new_image_processor("dit", 16), config.data.sequence_length, LABELS)
    model = build_model(config.model, objective.processor, objective.auto_class, objective.model_options(), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    golden: Any = objective.golden_requests(None)
    return write_bundle(folder, model, objective, BundleInfo("painter", golden))


@pytest.fixture(scope="module")
def bundle(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tiny, tmp_path_factory.mktemp("painter") / "bundle")


@pytest.fixture(scope="module")
def endpoint(ray: None, tiny: Config, bundle: Bundle) -> Iterator[Endpoint]:
    deployed = deploy(
        with_values(tiny, {"serve.port": free_port(), "serve.batch_wait_s": 0.05, "serve.max_replicas": 1}),
        {"painter": bundle.folder},
    )
    yield deployed
    deployed.stop()


@pytest.fixture(scope="module")
def api(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def generate_images(api: openai.OpenAI, prompt: str, seed: int, n: int = 1) -> list[str]:
    response = api.images.generate(
        model="painter", prompt=prompt, n=n, response_format="b64_json", extra_body={"seed": seed}
    )
    return [image.b64_json or "" for image in response.data or []]


def pixels(content: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)


def test_openais_client_gets_the_bundles_images(api: openai.OpenAI, bundle: Bundle) -> None:
    images = generate_images(api, "dog", 7, n=2)
    requests = [{"prompt": "dog", "seed": 7}, {"prompt": "dog", "seed": 8}]
    expected = [prediction["image"] for prediction in bundle.objective().predict(bundle.model(), requests)]
    for image, expected_image in zip(images, expected, strict=True):
        assert Image.open(io.BytesIO(base64.b64decode(image))).format == "PNG"
        assert pixels(image).shape == (16, 16, 3)
        assert np.abs(pixels(image) - pixels(expected_image)).max() <= 1  # another number of threads rounds differently
    assert images[0] != images[1]
    assert generate_images(api, "dog", 8) == images[1:]
    assert generate_images(api, "cat", 7)[0] != images[0]
    assert {listed.id for listed in api.models.list()} == {"painter"}


def test_image_does_not_depend_on_the_batch(api: openai.OpenAI, endpoint: Endpoint) -> None:
    def load_stats() -> tuple[int, int]:
        time.sleep(1.1)  # for a second the ingress returns the last figures
        replicas: list[Any] = []
        wait_for(
            lambda: replicas.extend(httpx.get(f"{endpoint.url}/v1/replicas", timeout=60).json()["data"]) or replicas
        )
        return replicas[0]["steps"], replicas[0]["rows"]

    requests = [(LABELS[i % 3], 100 + i) for i in range(7)]
    alone = [generate_images(api, *request)[0] for request in requests]
    steps, rows = load_stats()
    with ThreadPoolExecutor(7) as pool:
        assert [images[0] for images in pool.map(lambda request: generate_images(api, *request), requests)] == alone
    after = load_stats()
    assert after[1] - rows == 7 * 5
    assert after[0] - steps < 7 * 5  # some forwards had several rows
    assert len(set(alone)) == 7


def test_example_that_deploy_prints_works(endpoint: Endpoint, bundle: Bundle) -> None:
    info = controller_state().models["painter"].stable.info
    assert info
    path, *options = shlex.split(example_request("painter", info, bundle.folder, needs_key=True))
    assert options[:4] == ["-H", "Authorization: Bearer KEY", "-H", "Content-Type: application/json"]
    response = httpx.post(
        f"{endpoint.url}/v1/{path}", content=options[-1], headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 200, response.text


def test_random_seed_is_returned(endpoint: Endpoint, api: openai.OpenAI) -> None:
    body = {"prompt": " Plane", "n": 2, "size": "16x16", "quality": "auto"}
    response = httpx.post(f"{endpoint.url}/v1/images/generations", json=body, timeout=60).json()
    assert generate_images(api, "plane", response["seed"], n=2) == [image["b64_json"] for image in response["data"]]
    assert (response["model"], response["size"], response["output_format"]) == ("painter", "16x16", "png")
    usage = {"input_tokens": 2, "output_tokens": 2 * 16, "total_tokens": 2 + 2 * 16}
    assert response["usage"] == usage | {"input_tokens_details": {"text_tokens": 2, "image_tokens": 0}}
    lines = httpx.get(f"{endpoint.url}/metrics").text.splitlines()
    counted = [line for line in lines if "manta_requests_total{" in line and 'path="/v1/images/generations"' in line]
    assert any('status="200"' in line and 'model="painter"' in line for line in counted)
    assert any("manta_tokens_total{" in line and 'kind="completion"' in line for line in lines)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "a red cat"}, "prompt", "'a red cat' is none of this model's labels: it makes images of cat, dog, plane"),
        ({"prompt": "cat", "size": "1024x1024"}, "size", "makes images of 16x16, not 1024x1024: leave size out"),
        ({"prompt": "cat", "size": "large"}, "size", "pattern"),
        ({"prompt": "cat", "response_format": "url"}, "response_format", "use b64_json"),
        ({"prompt": "cat", "n": 11}, "n", "less than or equal to 10"),
        ({"prompt": "cat", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "cat", "style": "vivid"}, "style", "no such option"),
        ({"prompt": ["cat"]}, "prompt", "string"),
        ({"n": 1}, "prompt", "required"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused_in_openais_form(
    endpoint: Endpoint, body: dict[str, Any], param: str, message: str
) -> None:
    response = httpx.post(f"{endpoint.url}/v1/images/generations", content=json.dumps(body), headers={"Content-Type": "application/json"})  # fmt: skip
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_other_tasks_are_refused(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'dall-e-3' is not served here; there are painter"):
        api.images.generate(model="dall-e-3", prompt="cat")
    with pytest.raises(openai.BadRequestError, match="model 'painter' does images, not completion"):
        api.completions.create(model="painter", prompt="x")
    with pytest.raises(openai.BadRequestError, match="it does not embed texts"):
        api.embeddings.create(model="painter", input="x")


def test_page_shows_images(endpoint: Endpoint, browser_page: Any) -> None:
    page, errors = browser_page, list[str]()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(endpoint.url)
    page.wait_for_selector("#model option", state="attached")
    assert page.is_checked('input[value="images"]')
    assert page.is_hidden("#tokens")
    page.fill("#text", "cat")
    page.fill("#count", "2")
    page.fill("#seed", "3")
    page.click("#send")
    wait_for(lambda: page.evaluate("[...document.images].filter(image => image.naturalWidth == 16).length") == 2)
    assert page.get_attribute(".images img", "alt") == "cat, seed 3"
    page.click("article .up")
    page.wait_for_selector('article .up[aria-pressed="true"]')
    assert not errors

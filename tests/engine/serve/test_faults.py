"""What clients meet when an endpoint is full, loses a replica, or is not what it was; and when they leave."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, ServeConfig, with_values
from engine.errors import UserError
from engine.serve.deploy import Endpoint, deploy, refuse_what_cannot_fit
from engine.serve.forward import Packed
from engine.serve.generation import Completion, TransformersGenerator
from engine.serve.replica import Replica
from engine.serve.requests import CompletionRequest
from tests.engine.bundles.making import fresh_bundle
from tests.engine.serve.test_serve import free_port


def wait_for(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def bundle(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fresh_bundle(tiny, tmp_path_factory.mktemp("faults") / "writer" / "bundle")


@pytest.fixture(scope="module")
def endpoint(ray: None, tiny: Config, bundle: Bundle) -> Iterator[Endpoint]:
    small = {"serve.max_batch": 1, "serve.max_queue": 3, "serve.max_replicas": 1}
    up = deploy(with_values(tiny, {"serve.port": free_port(), **small}), {"writer": bundle.folder})
    yield up
    up.stop()


def counted(endpoint: Endpoint, status: int) -> float:
    of_it = ("manta_requests_total{", 'model="writer"', 'path="/v1/completions"', f'status="{status}"')
    lines = httpx.get(f"{endpoint.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(it in line for it in of_it))


def test_a_full_endpoint_says_when_to_come_again(endpoint: Endpoint) -> None:
    def ask(_: int) -> httpx.Response:
        body = {"prompt": "import os", "max_tokens": 120, "temperature": 0}  # some tenths of a second
        return httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=60)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(48)))
    full = [answer for answer in answers if answer.status_code == 429]
    assert full
    assert {answer.status_code for answer in answers} == {200, 429}
    assert {answer.headers["Retry-After"] for answer in full} == {"1"}
    assert full[0].json()["error"]["type"] == "rate_limit_error"
    assert ask(0).status_code == 200


def test_more_sequences_than_may_wait_are_refused(endpoint: Endpoint) -> None:
    body = {"prompt": ["a", "b"], "n": 2}
    answer = httpx.post(f"{endpoint.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "2 prompts x n 2 are over this endpoint's 3 completions a request" in answer.json()["error"]["message"]


def test_a_client_that_left_is_counted(endpoint: Endpoint) -> None:
    before = counted(endpoint, 499)
    body = {"prompt": "x", "max_tokens": 120, "n": 3, "temperature": 0, "stream": True}  # one after the other

    def leave() -> bool:  # tried again where the endpoint was done before it noticed
        with httpx.stream("POST", f"{endpoint.url}/v1/completions", json=body) as stream:
            next(stream.iter_lines())
        time.sleep(0.3)
        return counted(endpoint, 499) > before

    wait_for(leave)


def test_a_lost_replica_is_told_and_replaced(endpoint: Endpoint) -> None:
    def replica() -> psutil.Process | None:
        named = (p for p in psutil.process_iter(["cmdline"]) if "bundle-writer" in " ".join(p.info["cmdline"] or []))
        return next(named, None)

    wait_for(replica)
    lost = replica()
    assert lost
    lost.kill()
    seen = set()

    def replaced() -> bool:
        answer = httpx.post(f"{endpoint.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        seen.add(answer.status_code)
        new = replica()
        return answer.status_code == 200 and new is not None and new.pid != lost.pid

    wait_for(replaced)
    assert seen == {200}
    wait_for(lambda: httpx.get(f"{endpoint.url}/readyz", timeout=10).status_code == 200)


def test_a_bundle_that_answers_otherwise_takes_no_traffic(
    ray: None, endpoint: Endpoint, tiny: Config, bundle: Bundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    manifest = json.loads((copy / "manta.json").read_text())
    manifest["golden"][0]["output"]["logprobs"][0] += 0.5
    (copy / "manta.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not answer as recorded"):
        Bundle.open(copy).replay(Bundle.open(copy).model())


def test_replicas_that_cannot_be_placed_are_refused(ray: None, tiny: Config, bundle: Bundle) -> None:
    asked = ServeConfig(cpus_per_replica=500.0)
    with pytest.raises(UserError, match=r"1 replicas x 500 cores are asked, the cluster has 4 cores: use fewer"):
        refuse_what_cannot_fit(asked, 1, beside=False)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_left_at_once_is_counted(endpoint: Endpoint, stream: bool) -> None:
    before = counted(endpoint, 499)
    body = {"prompt": "import os", "max_tokens": 120, "stream": stream, "logit_bias": {"0": -100}}

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            asking = asyncio.create_task(client.post(f"{endpoint.url}/v1/completions", json=body))
            await asyncio.sleep(0.05)
            asking.cancel()

    asyncio.run(leave())
    wait_for(lambda: counted(endpoint, 499) == before + 1)


def job(**options: Any) -> dict[str, Any]:
    body = {"prompt": "import os", "max_tokens": 100, "temperature": 0, "stream": True} | options
    return CompletionRequest(**body).job()


def test_a_lane_is_free_once_the_reader_left(bundle: Bundle) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig()))
    generator = replica.generator
    assert isinstance(generator, TransformersGenerator)

    async def leave() -> list[Completion]:
        messages = replica.stream(job(n=3))
        await anext(messages)
        running = list(generator.running)
        await messages.aclose()  # type: ignore[attr-defined]
        whole = asyncio.create_task(replica.complete(job(stream=False)))
        while not whole.done() and not any(it not in running for it in generator.running):
            await asyncio.sleep(0)
        running += generator.running
        whole.cancel()
        return running

    left = asyncio.run(leave())
    wait_for(lambda: generator.load["running"] == 0)
    assert generator.load["waiting"] == 0
    assert all(it.cancelled and len(it.tokens) < 100 for it in left if it.reason == "cancelled")
    assert any(it.reason == "cancelled" for it in left)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_bundle_is_served_in_the_precision_asked_for(bundle: Bundle, precision: str, dtype: torch.dtype) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig(precision=precision)))
    assert {p.dtype for p in replica.model.parameters()} == {dtype}
    assert isinstance(replica.generator, TransformersGenerator)
    assert isinstance(replica.generator.forward, Packed)
    answer = asyncio.run(replica.complete(job(stream=False, max_tokens=9)))
    assert answer["choices"][0]["tokens"] == 9


def test_who_waits_too_long_is_told(bundle: Bundle) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig(max_batch=1, queue_timeout_s=0.05)))

    async def ask() -> list[dict[str, Any]]:
        jobs = [job(stream=False, max_tokens=110, logit_bias={"0": -100}) for _ in range(20)]
        return list(await asyncio.gather(*(replica.complete(it) for it in jobs)))

    answers = asyncio.run(ask())
    assert "choices" in answers[0]
    assert answers[-1] == {"error": "no place was free in time: try again in a second", "param": None, "status": 503}


def test_an_error_of_one_request_is_told_and_the_others_go_on(bundle: Bundle) -> None:
    model = bundle.model()
    generator = TransformersGenerator(model, 128, max_batch=2, max_queue=4, step_tokens=64)
    good = Completion([10, 11, 12], 40)
    bad = Completion([10**9], 5)  # no such token
    generator.submit([good, bad])
    wait_for(lambda: good.reason and bad.reason)
    assert bad.reason == "error"
    assert "index out of range" in bad.error
    assert good.reason in ("length", "stop")
    assert generator.alive
    with torch.inference_mode():
        alone = model.generate(
            torch.tensor([[10, 11, 12]]), attention_mask=torch.ones(1, 3), max_new_tokens=40, do_sample=False
        )[0, 3:].tolist()
    assert good.tokens == [token for token in alone if token not in generator.eos_ids]


def test_deploy_serves_until_it_is_interrupted(bundle: Bundle, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "jobs.manta", "deploy", f"bundle={bundle.folder}", f"serve.port={port}"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        children: list[psutil.Process] = []
        said = ""
        try:
            assert process.stdout
            while "Ctrl-C ends it" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert f"serving writer at http://127.0.0.1:{port}" in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive

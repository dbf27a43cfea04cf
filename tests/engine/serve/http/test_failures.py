"""What clients meet when an endpoint is full, loses a replica, or is not what it was; and when they leave."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
from engine.serve.deploy import Endpoint, deploy
from engine.serve.http.schemas import CompletionRequest
from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.model_runner import BatchedRunner
from engine.serve.preflight import check_capacity
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import metrics_at_rest, processes, said_until, wait_for
from tests.engine.serve.llm.paused_engine import held
from tests.ports import free_port

LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 120, "n": 3, "logit_bias": {"0": -100}}  # one after the other


@pytest.fixture(scope="module")
def bundle(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fresh_bundle(tiny, tmp_path_factory.mktemp("faults") / "writer" / "bundle")


@pytest.fixture(scope="module")
def endpoint(ray: None, tiny: Config, bundle: Bundle) -> Iterator[Endpoint]:
    small = {"serve.max_num_seqs": 1, "serve.max_queue": 3, "serve.max_replicas": 1}
    up = deploy(with_values(tiny, {"serve.port": free_port(), **small}), {"writer": bundle.folder})
    yield up
    up.stop()


def counted(endpoint: Endpoint, status: int) -> float:
    of_it = ("manta_requests_total{", 'model="writer"', 'path="/v1/completions"', f'status="{status}"')
    lines = metrics_at_rest(endpoint.url)
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(it in line for it in of_it))


def test_a_full_endpoint_says_when_to_come_again(endpoint: Endpoint) -> None:
    def ask(_: int) -> httpx.Response:
        return client.post(f"{endpoint.url}/v1/completions", json=LONG)

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(48)))
    full = [answer for answer in answers if answer.status_code == 429]
    assert full
    assert {answer.status_code for answer in answers} == {200, 429}
    assert {answer.headers["Retry-After"] for answer in full} == {"1"}
    assert full[0].json()["error"]["type"] == "rate_limit_error"
    assert httpx.post(f"{endpoint.url}/v1/completions", json=LONG, timeout=60).status_code == 200


def test_more_sequences_than_may_wait_are_refused(endpoint: Endpoint) -> None:
    body = {"prompt": ["a", "b"], "n": 2}
    answer = httpx.post(f"{endpoint.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "2 prompts x n 2 are over this endpoint's 3 completions a request" in answer.json()["error"]["message"]


def test_a_client_that_left_is_counted(endpoint: Endpoint) -> None:
    before = counted(endpoint, 499)
    body = LONG | {"stream": True}

    def leave() -> bool:
        with httpx.stream("POST", f"{endpoint.url}/v1/completions", json=body) as stream:
            next(stream.iter_lines())
        time.sleep(0.3)
        return counted(endpoint, 499) > before

    wait_for(leave)  # tried again where the endpoint was done before it noticed


def test_a_lost_replica_is_told_and_replaced(endpoint: Endpoint) -> None:
    (lost,) = processes("bundle-writer")
    lost.kill()
    seen = set()

    def replaced() -> bool:
        answer = httpx.post(f"{endpoint.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        seen.add(answer.status_code)
        return answer.status_code == 200 and lost.pid not in {it.pid for it in processes("bundle-writer")}

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
    with pytest.raises(UserError, match="does not reproduce its golden outputs"):
        Bundle.open(copy).replay(Bundle.open(copy).model())


def test_replicas_that_cannot_be_placed_are_refused(ray: None, tiny: Config, bundle: Bundle) -> None:
    asked = ServeConfig(cpus_per_replica=500.0)
    with pytest.raises(UserError, match=r"1 replicas x 500 cores are needed, the cluster has 4 cores: use fewer"):
        check_capacity(asked, 1, beside=False)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_left_at_once_is_counted(endpoint: Endpoint, stream: bool) -> None:
    before, tries = counted(endpoint, 499), itertools.count(1)

    async def leave(after_s: float) -> None:
        async with httpx.AsyncClient() as client:
            asking = asyncio.create_task(client.post(f"{endpoint.url}/v1/completions", json=LONG | {"stream": stream}))
            await asyncio.sleep(after_s)
            asking.cancel()

    def noticed() -> bool:  # tried again where it left before the endpoint had it, or after the answer
        number = next(tries)
        asyncio.run(leave(0.02 * (1 + number % 10)))
        time.sleep(0.3)
        assert counted(endpoint, 499) <= before + number  # each once
        return counted(endpoint, 499) > before

    wait_for(noticed)


def job(**options: Any) -> dict[str, Any]:
    body = {
        "prompt": "import os",
        "max_tokens": 100,
        "temperature": 0,
        "stream": True,
        "logit_bias": {"0": -100},
    } | options
    return CompletionRequest(**body).job()


def test_a_lane_is_free_once_the_reader_left(bundle: Bundle) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig()))
    generator = replica.engine
    assert isinstance(generator, TransformersEngine)

    async def leave() -> list[Sequence]:
        with held(generator, after=50):
            messages = replica.stream(job(n=3))
            await anext(messages)
            left = list(generator.running)
            await messages.aclose()  # type: ignore[attr-defined]
        while generator.running:
            await asyncio.sleep(0.01)
        with held(generator, after=5):
            whole = asyncio.create_task(replica.complete(job(stream=False)))
            while not any(it.tokens for it in generator.running):
                await asyncio.sleep(0.01)
            left += generator.running
            whole.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await whole
        return left

    left = asyncio.run(leave())
    wait_for(lambda: generator.load["running"] == 0)
    assert generator.load["waiting"] == 0
    assert len(left) == 4
    assert all(it.finish_reason == "cancelled" and 0 < len(it.tokens) < 100 for it in left)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_bundle_is_served_in_the_precision_asked_for(bundle: Bundle, precision: str, dtype: torch.dtype) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig(precision=precision)))
    assert {p.dtype for p in replica.model.parameters()} == {dtype}
    assert isinstance(replica.engine, TransformersEngine)
    assert isinstance(replica.engine.runner, BatchedRunner)
    answer = asyncio.run(replica.complete(job(stream=False, max_tokens=9)))
    assert answer["choices"][0]["tokens"] == 9


def test_who_waits_too_long_is_told(bundle: Bundle) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig(max_num_seqs=1, queue_timeout_s=2.0)))
    generator = replica.engine
    assert isinstance(generator, TransformersEngine)

    async def ask() -> list[dict[str, Any]]:
        with held(generator):
            first = asyncio.create_task(replica.complete(job(stream=False)))
            while not generator.running:
                await asyncio.sleep(0.01)
            others = [asyncio.create_task(replica.complete(job(stream=False))) for _ in range(3)]
            await asyncio.sleep(2.5)
        return [await it for it in (first, *others)]

    answered, *late = asyncio.run(ask())
    assert answered["choices"][0]["tokens"] == 100
    assert late == 3 * [{"error": "no place was free in time: try again in a second", "param": None, "status": 503}]


def test_an_error_of_one_request_is_told_and_the_others_go_on(bundle: Bundle) -> None:
    model = bundle.model()
    generator = TransformersEngine(model, 128, max_num_seqs=2, max_queue=4, max_batched_tokens=64)
    good = Sequence([10, 11, 12], 40)
    bad = Sequence([10**9], 5)  # no such token
    generator.submit([good, bad])
    wait_for(lambda: good.finish_reason and bad.finish_reason)
    assert bad.finish_reason == "error"
    assert "index out of range" in bad.error
    assert good.finish_reason in ("length", "stop")
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
            said = said_until(process, "Ctrl-C ends it")
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert f"serving writer at http://127.0.0.1:{port}" in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive

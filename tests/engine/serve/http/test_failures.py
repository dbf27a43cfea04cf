"""Failures: a full queue, a lost replica, a changed bundle, clients that hang up, a sequence that fails."""

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
from engine.serve.jobs import Failure, GenerationJob, GenerationResult
from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.model_runner import BatchedRunner
from engine.serve.llm.sequence import Sequence
from engine.serve.preflight import check_capacity
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import metrics_at_rest, processes, read_until, wait_for
from tests.engine.serve.llm.paused_engine import paused
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


def count_requests(endpoint: Endpoint, status: int) -> float:
    labels = ("manta_requests_total{", 'model="writer"', 'path="/v1/completions"', f'status="{status}"')
    lines = metrics_at_rest(endpoint.url)
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in labels))


def test_a_full_queue_returns_429_with_retry_after(endpoint: Endpoint) -> None:
    def ask(_: int) -> httpx.Response:
        return client.post(f"{endpoint.url}/v1/completions", json=LONG)

    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(ask, range(48)))
    full = [response for response in responses if response.status_code == 429]
    assert full
    assert {response.status_code for response in responses} == {200, 429}
    assert {response.headers["Retry-After"] for response in full} == {"1"}
    assert full[0].json()["error"]["type"] == "rate_limit_error"
    assert httpx.post(f"{endpoint.url}/v1/completions", json=LONG, timeout=60).status_code == 200


def test_a_request_larger_than_the_queue_is_refused(endpoint: Endpoint) -> None:
    body = {"prompt": ["a", "b"], "n": 2}
    response = httpx.post(f"{endpoint.url}/v1/completions", json=body)
    assert response.status_code == 400
    assert "2 prompts x n 2 are over this endpoint's 3 completions a request" in response.json()["error"]["message"]


def test_an_aborted_stream_is_counted(endpoint: Endpoint) -> None:
    before = count_requests(endpoint, 499)
    body = LONG | {"stream": True}

    def hang_up() -> bool:
        with httpx.stream("POST", f"{endpoint.url}/v1/completions", json=body) as stream:
            next(stream.iter_lines())
        time.sleep(0.3)
        return count_requests(endpoint, 499) > before

    wait_for(hang_up)  # repeated where the response was complete before the hang-up was noticed


def test_a_lost_replica_is_replaced(endpoint: Endpoint) -> None:
    (lost,) = processes("bundle-writer")
    lost.kill()
    seen = set()

    def replaced() -> bool:
        response = httpx.post(f"{endpoint.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
        if response.status_code != 200:
            assert response.json()["error"]["message"]
        seen.add(response.status_code)
        return response.status_code == 200 and lost.pid not in {process.pid for process in processes("bundle-writer")}

    wait_for(replaced)
    assert seen == {200}
    wait_for(lambda: httpx.get(f"{endpoint.url}/readyz", timeout=10).status_code == 200)


def test_a_bundle_that_fails_its_replay_is_refused(
    ray: None, endpoint: Endpoint, tiny: Config, bundle: Bundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    manifest = json.loads((copy / "manta.json").read_text())
    manifest["golden"][0]["output"]["logprobs"][0] += 0.5
    (copy / "manta.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not reproduce its golden outputs"):
        Bundle.open(copy).replay(Bundle.open(copy).model())


def test_replicas_that_cannot_be_placed_are_refused(ray: None, tiny: Config, bundle: Bundle) -> None:
    options = ServeConfig(cpus_per_replica=500.0)
    with pytest.raises(UserError, match=r"1 replicas x 500 cores are needed, the cluster has 4 cores: use fewer"):
        check_capacity(options, 1, beside_others=False)


@pytest.mark.parametrize("stream", [True, False])
def test_an_aborted_request_is_counted_once(endpoint: Endpoint, stream: bool) -> None:
    before, tries = count_requests(endpoint, 499), itertools.count(1)

    async def hang_up(after_s: float) -> None:
        async with httpx.AsyncClient() as client:
            request = asyncio.create_task(client.post(f"{endpoint.url}/v1/completions", json=LONG | {"stream": stream}))
            await asyncio.sleep(after_s)
            request.cancel()

    def is_counted() -> bool:  # repeated where it hung up before the endpoint had the request, or after the response
        number = next(tries)
        asyncio.run(hang_up(0.02 * (1 + number % 10)))
        time.sleep(0.3)
        assert count_requests(endpoint, 499) <= before + number  # once each
        return count_requests(endpoint, 499) > before

    wait_for(is_counted)


def job(**options: Any) -> GenerationJob:
    body = {
        "prompt": "import os",
        "max_tokens": 100,
        "temperature": 0,
        "stream": True,
        "logit_bias": {"0": -100},
    } | options
    return CompletionRequest(**body).job()


def test_an_abort_frees_the_slots(bundle: Bundle) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig()))
    engine = replica.engine
    assert isinstance(engine, TransformersEngine)

    async def hang_up() -> list[Sequence]:
        with paused(engine, after=50):
            messages = replica.stream(job(n=3))
            await anext(messages)
            aborted = list(engine.scheduler.running)
            await messages.aclose()  # type: ignore[attr-defined]
        while engine.scheduler.running:
            await asyncio.sleep(0.01)
        with paused(engine, after=5):
            task = asyncio.create_task(replica.complete(job(stream=False)))
            while not any(sequence.tokens for sequence in engine.scheduler.running):
                await asyncio.sleep(0.01)
            aborted += engine.scheduler.running
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return aborted

    aborted = asyncio.run(hang_up())
    wait_for(lambda: engine.stats["running"] == 0)
    assert engine.stats["waiting"] == 0
    assert len(aborted) == 4
    assert all(seq.finish_reason == "abort" and 0 < len(seq.tokens) < 100 for seq in aborted)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_bundle_is_served_in_the_configured_precision(bundle: Bundle, precision: str, dtype: torch.dtype) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig(precision=precision)))
    assert {p.dtype for p in replica.model.parameters()} == {dtype}
    assert isinstance(replica.engine, TransformersEngine)
    assert isinstance(replica.engine.runner, BatchedRunner)
    result = asyncio.run(replica.complete(job(stream=False, max_tokens=9)))
    assert isinstance(result, GenerationResult)
    assert result.choices[0].num_tokens == 9


def test_a_sequence_past_its_deadline_fails(bundle: Bundle) -> None:
    replica = Replica(str(bundle.folder), asdict(ServeConfig(max_num_seqs=1, queue_timeout_s=2.0)))
    engine = replica.engine
    assert isinstance(engine, TransformersEngine)

    async def send_jobs() -> list[GenerationResult | Failure]:
        with paused(engine):
            first = asyncio.create_task(replica.complete(job(stream=False)))
            while not engine.scheduler.running:
                await asyncio.sleep(0.01)
            others = [asyncio.create_task(replica.complete(job(stream=False))) for _ in range(3)]
            await asyncio.sleep(2.5)
        return [await task for task in (first, *others)]

    completed, *expired = asyncio.run(send_jobs())
    assert isinstance(completed, GenerationResult)
    assert completed.choices[0].num_tokens == 100
    assert expired == 3 * [Failure("no place was free in time: try again in a second", None, 503)]


def test_a_failing_sequence_does_not_stop_others(bundle: Bundle) -> None:
    model = bundle.model()
    engine = TransformersEngine(model, 128, max_num_seqs=2, max_queue=4, max_batched_tokens=64)
    good = Sequence([10, 11, 12], 40)
    bad = Sequence([10**9], 5)  # outside of the vocabulary
    engine.submit([good, bad])
    wait_for(lambda: good.finish_reason and bad.finish_reason)
    assert bad.finish_reason == "error"
    assert "index out of range" in bad.error
    assert good.finish_reason in ("length", "stop")
    assert engine.is_alive
    with torch.inference_mode():
        alone = model.generate(
            torch.tensor([[10, 11, 12]]), attention_mask=torch.ones(1, 3), max_new_tokens=40, do_sample=False
        )[0, 3:].tolist()
    assert good.tokens == [token for token in alone if token not in engine.eos_ids]


def test_deploy_serves_until_it_is_interrupted(bundle: Bundle, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "jobs.manta", "deploy", f"bundle={bundle.folder}", f"serve.port={port}"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        children: list[psutil.Process] = []
        output = ""
        try:
            output = read_until(process, "Ctrl-C ends it")
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGINT)
        output += process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert f"serving writer at http://127.0.0.1:{port}" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive

"""SIGKILL under background_load, of a replica, the ingress and Serve's controller: what clients see, and for how long; and a soak test."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.serve.deploy import Endpoint, deploy
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import CompletedRequest, background_load, processes, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.slow
REQUEST = {"model": "writer", "prompt": "import os", "max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100}}


def process(name: str) -> psutil.Process:
    """Return the process of a Ray actor by a part of its title."""
    matches = processes(name)
    assert matches, name
    return matches[0]


@pytest.fixture(scope="module")
def endpoint(ray: None, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    bundle: Bundle = fresh_bundle(tiny, tmp_path_factory.mktemp("kills") / "writer" / "bundle")
    two = {"serve.min_replicas": 2, "serve.max_replicas": 2, "serve.port": free_port(), "name": "kills"}
    up = deploy(with_values(tiny, two), {"writer": bundle.folder})
    yield up
    up.stop()


def downtime_s(requests: list[CompletedRequest], killed: float) -> float:
    """Return the seconds from a kill to the first response to a request that began after it, or to the last failure."""
    failures = [request.finished_at for request in requests if request.status != 200]
    recovered_at = min(
        request.finished_at for request in requests if request.status == 200 and request.started_at > killed
    )
    return max([recovered_at, *failures]) - killed


def test_no_request_is_lost_with_a_replica(endpoint: Endpoint) -> None:
    with background_load(endpoint.url, REQUEST, clients=6) as requests:
        wait_for(lambda: len(requests) > 20)
        lost = process("bundle-writer")
        killed = time.monotonic()
        lost.kill()
        num_requests = len(requests)
        wait_for(lambda: len(requests) > num_requests + 60)
    assert {request.status for request in requests} == {200}
    slowest = max(request.finished_at - request.started_at for request in requests if request.finished_at > killed)
    print(f"a replica killed: no request lost of {len(requests)}, the slowest took {slowest:.2f} s")
    assert len({request.body["choices"][0]["text"] for request in requests}) == 1
    wait_for(lambda: replicas() == 2)


def replicas() -> int:
    return len(processes("bundle-writer"))


def test_streams_of_a_lost_replica_get_an_error_event_and_queued_ones_are_retried(endpoint: Endpoint) -> None:
    body = REQUEST | {"stream": True, "max_tokens": 110, "n": 4, "prompt": "import os, sys"}
    wait_for(lambda: replicas() == 2)
    lost = process("bundle-writer")
    started: list[int] = []
    client = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=40))

    def read(number: int) -> list[str]:
        lines = []
        with client.stream("POST", f"{endpoint.url}/v1/completions", json=body) as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                if line:
                    lines.append(line[6:])
                    started.append(number)
        return lines

    with client, ThreadPoolExecutor(40) as pool:  # five times the 32 that both replicas run at once
        reading = [pool.submit(read, i) for i in range(40)]
        wait_for(lambda: len(set(started)) >= 20)
        lost.kill()
        streams = [future.result() for future in reading]
    assert all(lines[-1] == "[DONE]" for lines in streams)
    events = [[json.loads(line) for line in lines[:-1]] for lines in streams]
    complete = [stream_events for stream_events in events if "error" not in stream_events[-1]]
    cut = [stream_events for stream_events in events if "error" in stream_events[-1]]
    assert complete
    assert cut
    texts = {
        "".join(choice["text"] for event in stream_events for choice in event["choices"] if choice["index"] == 0)
        for stream_events in complete
    }
    assert len(texts) == 1
    for stream_events in cut:
        assert stream_events[-1]["error"]["type"] == "server_error"
        assert "the replica was lost" in stream_events[-1]["error"]["message"]
        assert any("choices" in event for event in stream_events), "nothing was streamed: it should have been retried"
    print(f"of 40 streams {len(cut)} ended with an error event, {len(complete)} were complete")
    wait_for(lambda: replicas() == 2)


def test_serves_controller_is_killed_without_effect(endpoint: Endpoint) -> None:
    with background_load(endpoint.url, REQUEST, clients=4) as requests:
        wait_for(lambda: len(requests) > 20)
        lost = process("ServeController")
        killed = time.monotonic()
        lost.kill()

        def is_back() -> bool:
            from ray import serve

            try:
                return (
                    process("ServeController").pid != lost.pid
                    and serve.status().applications["manta"].status == "RUNNING"
                )
            except (AssertionError, KeyError, Exception):
                return False

        wait_for(is_back)
        recovery_s = time.monotonic() - killed
        num_requests = len(requests)
        wait_for(lambda: len(requests) > num_requests + 40)
    assert {request.status for request in requests} == {200}
    print(f"the controller killed: no request lost of {len(requests)}; it was back after {recovery_s:.1f} s")


def test_the_ingress_is_killed_and_replaced(endpoint: Endpoint) -> None:
    """Connections break with it; OpenAI's client retries, and each of its requests gets a response."""
    api = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=8)
    with background_load(endpoint.url, REQUEST, clients=3, pause_s=0.02) as requests:
        wait_for(lambda: len(requests) > 20)
        lost = process("ServeReplica:manta:api")
        killed = time.monotonic()
        lost.kill()
        with ThreadPoolExecutor(8) as pool:
            texts = set(pool.map(lambda i: api.completions.create(**REQUEST, user=str(i)).choices[0].text, range(24)))  # type: ignore[call-overload]
        num_requests = len(requests)
        wait_for(lambda: [request.status for request in requests[num_requests:]].count(200) > 40)
    assert len(texts) == 1
    refused = [request for request in requests if request.status != 200]
    print(f"the ingress killed: {len(refused)} of {len(requests)} requests without a retry were lost; recovered {downtime_s(requests, killed):.1f} s later")  # fmt: skip
    assert downtime_s(requests, killed) < 60
    assert {request.status for request in requests if request.started_at > killed + 60} <= {200}


@pytest.mark.timeout(900)
def test_memory_stays_flat(endpoint: Endpoint) -> None:
    """A soak test of five minutes (MANTA_SOAK_S: seconds) with streams, hang-ups, malformed requests and long prompts."""
    seconds = float(os.environ.get("MANTA_SOAK_S", "300"))
    names = ("ServeReplica", "ServeController")

    def resident_bytes() -> dict[int, int]:
        return {process.pid: process.memory_info().rss for name in names for process in processes(name)}

    def send_mixed_requests() -> None:
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:
            client.post("/v1/completions", json=REQUEST | {"prompt": "word " * 80, "max_tokens": 5})
            client.post("/v1/completions", content=b"{")
            client.post("/v1/embeddings", json={"input": ["one", "two"]})
            with client.stream("POST", "/v1/completions", json=REQUEST | {"stream": True, "max_tokens": 60}) as stream:
                next(stream.iter_lines())  # then hang up

    started_at = time.monotonic()
    with background_load(endpoint.url, REQUEST, clients=4) as requests:
        while time.monotonic() < started_at + 0.3 * seconds:  # pools and caches fill
            send_mixed_requests()
        warm = resident_bytes()
        while time.monotonic() < started_at + seconds:
            send_mixed_requests()
        now = resident_bytes()
    assert {request.status for request in requests} == {200}
    growth = {process_id: now[process_id] - warm[process_id] for process_id in warm if process_id in now}
    hours = 0.7 * seconds / 3600
    print(f"{len(requests)} requests; growth in MiB: {sorted(round(size / 2**20, 1) for size in growth.values())}")
    assert len(growth) == len(warm) >= 4
    assert max(growth.values()) < 32 * 2**20, {
        process_id: round(size / hours / 2**20) for process_id, size in growth.items()
    }

"""Kill -9 under load: of a replica, the ingress, the controller. What clients see, and for how long."""

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
from tests.engine.serve.clients import Noted, load, processes, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.slow
ASK = {"model": "writer", "prompt": "import os", "max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100}}


def process(name: str) -> psutil.Process:
    """Return the process of a Ray actor by a part of its title."""
    found = processes(name)
    assert found, name
    return found[0]


@pytest.fixture(scope="module")
def endpoint(ray: None, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    bundle: Bundle = fresh_bundle(tiny, tmp_path_factory.mktemp("kills") / "writer" / "bundle")
    two = {"serve.min_replicas": 2, "serve.max_replicas": 2, "serve.port": free_port(), "name": "kills"}
    up = deploy(with_values(tiny, two), {"writer": bundle.folder})
    yield up
    up.stop()


def gap(noted: list[Noted], killed: float) -> float:
    """Return the seconds from a kill to the first answer to a request that began after it, or to the last refusal."""
    lost = [it.ended for it in noted if it.status != 200]
    good = min(it.ended for it in noted if it.status == 200 and it.began > killed)
    return max([good, *lost]) - killed


def test_no_request_is_lost_with_a_replica(endpoint: Endpoint) -> None:
    with load(endpoint.url, ASK, clients=6) as noted:
        wait_for(lambda: len(noted) > 20)
        lost = process("bundle-writer")
        killed = time.monotonic()
        lost.kill()
        asked = len(noted)
        wait_for(lambda: len(noted) > asked + 60)
    assert {it.status for it in noted} == {200}
    slowest = max(it.ended - it.began for it in noted if it.ended > killed)
    print(f"a replica killed: no request lost of {len(noted)}, the slowest took {slowest:.2f} s")
    assert len({it.body["choices"][0]["text"] for it in noted}) == 1
    wait_for(lambda: replicas() == 2)


def replicas() -> int:
    return len(processes("bundle-writer"))


def test_streams_in_flight_end_with_an_error_event_and_those_that_wait_go_on(endpoint: Endpoint) -> None:
    body = ASK | {"stream": True, "max_tokens": 110, "n": 4, "prompt": "import os, sys"}
    wait_for(lambda: replicas() == 2)
    lost = process("bundle-writer")
    begun: list[int] = []
    client = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=40))

    def read(number: int) -> list[str]:
        lines = []
        with client.stream("POST", f"{endpoint.url}/v1/completions", json=body) as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                if line:
                    lines.append(line[6:])
                    begun.append(number)
        return lines

    with client, ThreadPoolExecutor(40) as pool:  # five times the 32 that both replicas run at once
        reading = [pool.submit(read, i) for i in range(40)]
        wait_for(lambda: len(set(begun)) >= 20)
        lost.kill()
        streams = [it.result() for it in reading]
    assert all(lines[-1] == "[DONE]" for lines in streams)
    events = [[json.loads(line) for line in lines[:-1]] for lines in streams]
    whole = [it for it in events if "error" not in it[-1]]
    cut = [it for it in events if "error" in it[-1]]
    assert whole
    assert cut
    texts = {
        "".join(choice["text"] for event in it for choice in event["choices"] if choice["index"] == 0) for it in whole
    }
    assert len(texts) == 1
    for it in cut:
        assert it[-1]["error"]["type"] == "server_error"
        assert "the replica was lost" in it[-1]["error"]["message"]
        assert any("choices" in event for event in it), "nothing was streamed: it should have begun anew"
    print(f"of 40 streams {len(cut)} were cut and told so, {len(whole)} ended whole")
    wait_for(lambda: replicas() == 2)


def test_the_controller_is_killed_and_nobody_notices(endpoint: Endpoint) -> None:
    with load(endpoint.url, ASK, clients=4) as noted:
        wait_for(lambda: len(noted) > 20)
        lost = process("ServeController")
        killed = time.monotonic()
        lost.kill()

        def back() -> bool:
            from ray import serve

            try:
                return (
                    process("ServeController").pid != lost.pid
                    and serve.status().applications["manta"].status == "RUNNING"
                )
            except (AssertionError, KeyError, Exception):
                return False

        wait_for(back)
        again = time.monotonic() - killed
        asked = len(noted)
        wait_for(lambda: len(noted) > asked + 40)
    assert {it.status for it in noted} == {200}
    print(f"the controller killed: no request lost of {len(noted)}; it was back after {again:.1f} s")


def test_the_way_in_is_killed_and_comes_back(endpoint: Endpoint) -> None:
    """Connections end with it; OpenAI's client asks again by itself, and every request of its gets its answer."""
    api = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=8)
    with load(endpoint.url, ASK, clients=3, pause_s=0.02) as noted:
        wait_for(lambda: len(noted) > 20)
        lost = process("ServeReplica:manta:api")
        killed = time.monotonic()
        lost.kill()
        with ThreadPoolExecutor(8) as pool:
            texts = set(pool.map(lambda i: api.completions.create(**ASK, user=str(i)).choices[0].text, range(24)))  # type: ignore[call-overload]
        asked = len(noted)
        wait_for(lambda: [it.status for it in noted[asked:]].count(200) > 40)
    assert len(texts) == 1
    refused = [it for it in noted if it.status != 200]
    print(f"the ingress killed: {len(refused)} of {len(noted)} requests without a retry were lost; all well {gap(noted, killed):.1f} s later")  # fmt: skip
    assert gap(noted, killed) < 60
    assert {it.status for it in noted if it.began > killed + 60} <= {200}


@pytest.mark.timeout(900)
def test_memory_stays_flat(endpoint: Endpoint) -> None:
    """An hour's soak in five minutes; MANTA_SOAK_S makes it longer. Streams, hang-ups, bad requests and long prompts are in it."""
    seconds = float(os.environ.get("MANTA_SOAK_S", "300"))
    names = ("ServeReplica", "ServeController")

    def used() -> dict[int, int]:
        return {it.pid: it.memory_info().rss for name in names for it in processes(name)}

    def vary() -> None:
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:
            client.post("/v1/completions", json=ASK | {"prompt": "word " * 80, "max_tokens": 5})
            client.post("/v1/completions", content=b"{")
            client.post("/v1/embeddings", json={"input": ["one", "two"]})
            with client.stream("POST", "/v1/completions", json=ASK | {"stream": True, "max_tokens": 60}) as stream:
                next(stream.iter_lines())  # and hang up

    began = time.monotonic()
    with load(endpoint.url, ASK, clients=4) as noted:
        while time.monotonic() < began + 0.3 * seconds:  # pools and caches fill
            vary()
        warm = used()
        while time.monotonic() < began + seconds:
            vary()
        now = used()
    assert {it.status for it in noted} == {200}
    growth = {process_id: now[process_id] - warm[process_id] for process_id in warm if process_id in now}
    hours = 0.7 * seconds / 3600
    print(f"{len(noted)} requests; growth in MiB: {sorted(round(it / 2**20, 1) for it in growth.values())}")
    assert len(growth) == len(warm) >= 4
    assert max(growth.values()) < 32 * 2**20, {it: round(size / hours / 2**20) for it, size in growth.items()}

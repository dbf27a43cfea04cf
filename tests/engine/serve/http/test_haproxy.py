"""HAProxy in front of two ingresses: clients see the same as with one ingress, and either ingress may be lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from engine.bundles.bundle import Bundle
from engine.config import Config, replace, with_values
from engine.errors import UserError
from engine.serve.deploy import Endpoint, deploy
from engine.serve.http.api_keys import new_key
from engine.serve.http.feedback_store import read_records
from engine.serve.http.haproxy import haproxy_binary, haproxy_config, write_error_files
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import background_load, processes, read_until, wait_for
from tests.ports import free_port, listened

REQUEST: dict[str, Any] = {"prompt": "import os", "max_tokens": 8, "temperature": 0, "logit_bias": {"0": -100}}
LIMIT = 12  # requests per minute: one every 5 s
SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")


@dataclass(frozen=True)
class BalancedEndpoint:
    """An endpoint behind HAProxy, its bundle, and the secrets of its keys."""

    endpoint: Endpoint
    config: Config
    bundle: Bundle
    secrets: dict[str, str]

    @property
    def url(self) -> str:
        return self.endpoint.url

    def header(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[name]}"}

    def post(self, path: str, key: str, body: dict[str, Any]) -> httpx.Response:
        """Send a request on a new connection, which may lead to either ingress."""
        return httpx.post(f"{self.url}{path}", json=body, headers=self.header(key), timeout=60)

    def counts(self, name: str, *labels: str) -> Counter[str]:
        """Return a metric by ingress, summed over all label sets that contain these texts."""
        totals: Counter[str] = Counter()
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if (sample := SAMPLE.fullmatch(line)) and sample[1] == name and all(label in sample[2] for label in labels):
                totals[re.search(r'ingress="(\d+)"', sample[2])[1]] += float(sample[3])  # type: ignore[index]
        return totals


@pytest.fixture(scope="module")
def program() -> str:
    try:
        return haproxy_binary()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def balanced(
    ray: None, program: str, tiny: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BalancedEndpoint]:
    folder = tmp_path_factory.mktemp("before")
    bundle = fresh_bundle(tiny, folder / "writer" / "bundle")
    config = with_values(
        tiny,
        {"runs_dir": str(folder), "name": "before", "serve.port": free_port(), "serve.haproxy": True, "serve.ingresses": 2,
         "serve.max_body_bytes": 50_000, "serve.max_replicas": 1, "serve.body_timeout_s": 2.0},
    )  # fmt: skip
    limits: dict[str, tuple[int | None, int | None]] = {
        "alice": (None, None), "bob": (LIMIT, None), "carol": (None, 120), "dave": (None, None),
    }  # fmt: skip
    secrets = {name: new_key(config.keys_file, name, *limit, None)[0] for name, limit in limits.items()}
    up = deploy(config, {"writer": bundle.folder})
    yield BalancedEndpoint(up, config, bundle, secrets)
    started = [*haproxies(), *ingresses()]
    assert len(started) == 3
    up.stop()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def haproxies() -> list[psutil.Process]:
    return [process for process in processes("haproxy.cfg") if process.status() != psutil.STATUS_ZOMBIE]


def ingresses() -> list[psutil.Process]:
    return processes("ServeReplica:manta:api")


def test_openais_client(balanced: BalancedEndpoint) -> None:
    api = openai.OpenAI(base_url=f"{balanced.url}/v1", api_key=balanced.secrets["alice"], max_retries=0)
    request = REQUEST | {"max_tokens": 120}  # more than one chunk
    full = api.completions.create(model="writer", **request)
    parts = list(api.completions.create(model="writer", stream=True, **request))
    assert full.usage
    assert full.usage.completion_tokens == 120
    assert len(parts) > 1
    assert "".join(part.choices[0].text for part in parts) == full.choices[0].text
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        api.completions.create(model="other", **REQUEST)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{balanced.url}/v1", api_key="sk-manta-none", max_retries=0).models.list()
    with_id = httpx.get(f"{balanced.url}/healthz", headers={"X-Request-Id": "my-1"})
    assert with_id.headers.get_list("x-request-id") == ["my-1"]
    generated_ids = [httpx.get(f"{balanced.url}/healthz").headers.get_list("x-request-id") for _ in range(2)]
    assert [len(ids) for ids in generated_ids] == [1, 1]
    assert generated_ids[0] != generated_ids[1]


def test_rate_limits_hold_over_both_ingresses(balanced: BalancedEndpoint) -> None:
    counts = [balanced.counts("manta_requests_total", f'key="{key}"') for key in ("bob", "carol")]
    started_at = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        bob = pool.map(lambda _: balanced.post("/v1/completions", "bob", REQUEST).status_code, range(40))
        carol = pool.map(lambda _: balanced.post("/v1/completions", "carol", REQUEST | {"max_tokens": 50}).status_code, range(12))  # fmt: skip
        statuses = [Counter(bob), Counter(carol)]
    elapsed_s = time.monotonic() - started_at
    assert LIMIT <= statuses[0][200] <= LIMIT + elapsed_s * LIMIT / 60
    assert sorted(statuses[0]) == [200, 429]
    used = statuses[1][200] * 52  # of 120, refilled by two per second; one in flight reserves 50 and its prompt
    assert 52 <= used <= 120 + 2 * elapsed_s
    assert sorted(statuses[1]) == [200, 429]
    wait_for(lambda: sum((balanced.counts("manta_requests_total", 'key="bob"') - counts[0]).values()) == 40)
    assert len(balanced.counts("manta_requests_total", 'key="bob"') - counts[0]) == 2  # both have counted some
    assert balanced.post("/v1/completions", "alice", REQUEST).status_code == 200


def test_feedback_finds_requests_of_either_ingress(balanced: BalancedEndpoint) -> None:
    ids = [balanced.post("/v1/completions", "alice", REQUEST).json()["id"] for _ in range(6)]
    for number, request_id in enumerate(ids):
        body = {"request": request_id, "rating": "up" if number % 2 else "down"}
        assert balanced.post("/v1/feedback", "dave", body).status_code == 404  # of another key
        response = balanced.post("/v1/feedback", "alice", body)
        assert (response.status_code, response.json()["model"]) == (200, "writer")
    records = read_records(balanced.config.run_dir / "feedback", "feedback").to_pylist()
    assert sorted(record["request"] for record in records) == sorted(
        request_id.removeprefix("cmpl-") for request_id in ids
    )
    assert {(record["model"], record["version"], record["key"]) for record in records} == {
        ("writer", balanced.bundle.hash[:12], "alice")
    }
    rated = balanced.counts("manta_feedback_total", 'rating="down"')
    assert (sum(rated.values()), len(balanced.counts("manta_requests_total", 'key="alice"'))) == (3, 2)


def test_either_ingress_returns_all_metrics_once(balanced: BalancedEndpoint) -> None:
    labels = ("manta_requests_total", 'key="dave"', 'path="/v1/completions"')
    wait_for(lambda: sum(balanced.counts("manta_requests_in_flight").values()) == 1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: balanced.post("/v1/completions", "dave", REQUEST), range(10)))
    wait_for(lambda: sum(balanced.counts(*labels).values()) == 10)
    tokens = ("manta_tokens_total", 'key="dave"', 'kind="completion"')
    assert {(sum(balanced.counts(*labels).values()), sum(balanced.counts(*tokens).values())) for _ in range(6)} == {
        (10, 80)
    }
    assert len(balanced.counts(*labels)) == 2
    page = httpx.get(f"{balanced.url}/metrics", timeout=30).text
    assert len(re.findall(r"^manta_replicas\{", page, re.M)) == 1
    assert len(re.findall(r"^# TYPE manta_requests_total counter", page, re.M)) == 1


def test_nothing_listens_beyond_loopback(balanced: BalancedEndpoint) -> None:
    (haproxy,) = haproxies()
    port = balanced.config.serve.port
    listens = [
        connection.laddr for connection in haproxy.net_connections("inet") if connection.status == psutil.CONN_LISTEN
    ]
    assert listens == [("127.0.0.1", port)]
    assert not haproxy.net_connections("unix") or all(
        not connection.laddr for connection in haproxy.net_connections("unix")
    )
    assert listened([haproxy, *processes("ServeReplica")]) == {"127.0.0.1"}
    folder = Path(haproxy.cmdline()[-1]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    for process in ingresses():
        assert port not in {
            connection.laddr.port
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }


def test_large_and_slow_bodies_get_error_bodies(balanced: BalancedEndpoint) -> None:
    response = httpx.post(f"{balanced.url}/v1/completions", content=b" " * 10_000_000, headers=balanced.header("alice"), timeout=30)  # fmt: skip
    assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")
    with socket.create_connection(("127.0.0.1", balanced.config.serve.port), timeout=30) as client:
        headers = "\r\n".join(f"{name}: {value}" for name, value in balanced.header("alice").items())
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{headers}\r\nContent-Length: 100\r\n\r\n{{".encode()
        )
        head, _, body = client.recv(4096).partition(b"\r\n\r\n")
        assert b" 408 " in head.splitlines()[0]
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_aborts_a_request_at_once(balanced: BalancedEndpoint, stream: bool) -> None:
    labels = ("manta_requests_total", 'status="499"', 'key="alice"')
    aborted = sum(balanced.counts(*labels).values())
    long = REQUEST | {"max_tokens": 120, "n": 16, "stream": stream, "prompt": [7]}
    pauses = itertools.cycle([0.02, 0.04, 0.06, 0.08, 0.1])

    def hang_up() -> bool:
        body = json.dumps(long).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {balanced.secrets['alice']}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", balanced.config.serve.port), timeout=30) as client:
            client.sendall(head.encode() + body)
            if stream:
                assert b" 200 " in client.recv(4096).splitlines()[0]
            else:
                time.sleep(next(pauses))
        hung_up_at = time.monotonic()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: sum(balanced.counts(*labels).values()) > aborted, 1.5)
            print(f"noticed after {time.monotonic() - hung_up_at:.2f} s")
            return True
        return False

    wait_for(hang_up)  # repeated where the request was finished or not yet begun
    wait_for(lambda: not running(balanced), 5)


def running(balanced: BalancedEndpoint) -> float:
    """Return how many sequences the replicas run or queue."""
    replicas = httpx.get(f"{balanced.url}/v1/replicas", headers=balanced.header("alice")).json()["data"]
    return sum(replica["running"] + replica["waiting"] for replica in replicas)


def test_a_thousand_idle_connections_reach_no_ingress(balanced: BalancedEndpoint) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", balanced.config.serve.port)))
        assert balanced.post("/v1/completions", "alice", REQUEST).status_code == 200
        assert sum(len(process.net_connections("unix")) for process in ingresses()) < 200


def test_changed_options_reach_both_ingresses(balanced: BalancedEndpoint) -> None:
    with background_load(balanced.url, REQUEST | {"model": "writer"}, clients=2) as requests:
        deploy(replace(balanced.config, serve__max_body_bytes=20_000), {"writer": balanced.bundle.folder})
        body = {"prompt": "x" * 30_000}
        assert {balanced.post("/v1/completions", "alice", body).status_code for _ in range(8)} == {413}
        wait_for(lambda: len(requests) > 10)
    assert {request.status for request in requests} == {401}  # from an ingress: no connection was refused
    deploy(balanced.config, {"writer": balanced.bundle.folder})
    for options, message in (({"serve.ingresses": 3}, "serve.ingresses=2"), ({"serve.haproxy": False, "serve.ingresses": 1}, "serve.haproxy=true"), ({"serve.body_timeout_s": 9.0}, "serve.body_timeout_s=2.0")):  # fmt: skip
        with pytest.raises(UserError, match=f"has {message}, which can't change while it is up"):
            deploy(with_values(balanced.config, options), {"writer": balanced.bundle.folder})


def test_contradicting_options_are_refused(tiny: Config) -> None:
    with pytest.raises(UserError, match=r"serve.ingresses 2 need HAProxy in front of them: add serve.haproxy=true"):
        with_values(tiny, {"serve.ingresses": 2})
    with pytest.raises(UserError, match=r"serve.haproxy is for an endpoint that `manta deploy` starts"):
        with_values(tiny, {"serve.haproxy": True, "serve.export": "out"})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_haproxy_accepts_its_configuration(program: str, tmp_path: Path, host: str) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(haproxy_config(host, free_port(), [str(tmp_path / "0.sock")], write_error_files(tmp_path), 30, 60))
    check = subprocess.run([program, "-c", "-f", str(file)], capture_output=True, text=True)
    assert (check.returncode, "WARNING" in check.stderr) == (0, False), check.stderr


@pytest.mark.slow
def test_no_request_is_lost_with_an_ingress(balanced: BalancedEndpoint) -> None:
    requests: list[int] = []
    client = httpx.Client(base_url=balanced.url, headers=balanced.header("alice"), timeout=90)

    def ask(_: int) -> tuple[float, int, str]:
        started_at = time.monotonic()
        response = client.post("/v1/completions", json=REQUEST)
        requests.append(response.status_code)
        return time.monotonic() - started_at, response.status_code, response.text

    with client, ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(ask, i) for i in range(600)]
        wait_for(lambda: len(requests) > 60)
        lost = ingresses()[0]
        lost.kill()
        results = [future.result() for future in pending]
    assert {status for _, status, _ in results} == {200}, [result for result in results if result[1] != 200][:3]
    print(
        f"an ingress killed: none of {len(results)} lost, the slowest took {max(result[0] for result in results):.2f} s"
    )
    wait_for(lambda: len(ingresses()) == 2 and lost.pid not in {process.pid for process in ingresses()})
    wait_for(lambda: balanced.post("/v1/completions", "dave", REQUEST).status_code == 200 and len(balanced.counts("manta_requests_in_flight")) == 2)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", ["haproxy.cfg", "ServeReplica:manta-balancer"])
def test_haproxy_is_restarted(balanced: BalancedEndpoint, what: str) -> None:
    lost = processes(what)[-1]
    (old,) = haproxies()
    killed = time.monotonic()
    lost.kill()
    wait_for(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, 5)

    def back() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return balanced.post("/v1/completions", "alice", REQUEST).status_code == 200
        return False

    wait_for(back, 60)
    elapsed_s = time.monotonic() - killed
    print(f"{what} killed: back after {elapsed_s:.2f} s")
    assert elapsed_s < (2 if what == "haproxy.cfg" else 30)
    (new,) = haproxies()
    assert new.pid != old.pid


@pytest.mark.slow
def test_a_stream_in_flight_ends_with_its_ingress(balanced: BalancedEndpoint) -> None:
    body = REQUEST | {"stream": True, "max_tokens": 120, "n": 16}
    before_kill = balanced.counts("manta_requests_in_flight")
    assert len(before_kill) == 2
    with httpx.stream("POST", f"{balanced.url}/v1/completions", json=body, headers=balanced.header("alice"), timeout=30) as response:  # fmt: skip
        lines = response.iter_lines()
        next(lines)
        for process in ingresses():
            process.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    statuses: set[int] = set()

    def back() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            response = balanced.post("/v1/completions", "alice", REQUEST)
            statuses.add(response.status_code)
            if response.status_code == 503:
                assert (response.headers["Retry-After"], response.json()["error"]["type"]) == ("1", "server_error")
            return response.status_code == 200
        return False

    wait_for(back)
    assert statuses <= {200, 503}  # no connection was refused
    wait_for(lambda: len(balanced.counts("manta_requests_in_flight")) == 2)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_of_a_deployment(program: str, tiny: Config, tmp_path: Path, end: signal.Signals) -> None:
    bundle, port = fresh_bundle(tiny, tmp_path / "writer" / "bundle"), free_port()
    command = [sys.executable, "-m", "jobs.manta", "deploy", f"bundle={bundle.folder}", f"serve.port={port}",
               "serve.haproxy=true", "serve.ingresses=2", "serve.max_replicas=1", "tracking.enabled=false"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output, children = "", list[psutil.Process]()
        try:
            output = read_until(process, "Ctrl-C ends it")
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            children = psutil.Process(process.pid).children(recursive=True)
            assert [process.name() for process in children].count("haproxy") == 1
        finally:
            process.send_signal(end)
        output += process.communicate(timeout=120)[0] or ""
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL), output
    assert "Traceback" not in output
    if end == signal.SIGKILL:  # Ray's own agents end later
        children = [process for process in children if process.name() == "haproxy" or "Serve" in process.name()]
        assert len(children) >= 6
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [process.cmdline()[:3] for process in alive]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)

"""HAProxy before two ingresses: what clients see is what one ingress would tell, and either may be lost."""

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
from engine.serve.http.haproxy import binary, configuration, write_errors
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import load, processes, said_until, wait_for
from tests.ports import free_port, listened

ASK: dict[str, Any] = {"prompt": "import os", "max_tokens": 8, "temperature": 0, "logit_bias": {"0": -100}}
LIMIT = 12  # requests a minute: one each 5 s
SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")


@dataclass(frozen=True)
class Before:
    """An endpoint with HAProxy before it, its bundle, and the secrets of its keys."""

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
        """Ask on a connection of its own, which may lead to any ingress."""
        return httpx.post(f"{self.url}{path}", json=body, headers=self.header(key), timeout=60)

    def counts(self, name: str, *labels: str) -> Counter[str]:
        """Return a metric by ingress, summed over all label sets that hold these texts."""
        found: Counter[str] = Counter()
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if (it := SAMPLE.fullmatch(line)) and it[1] == name and all(label in it[2] for label in labels):
                found[re.search(r'ingress="(\d+)"', it[2])[1]] += float(it[3])  # type: ignore[index]
        return found


@pytest.fixture(scope="module")
def program() -> str:
    try:
        return binary()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def before(ray: None, program: str, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Before]:
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
    yield Before(up, config, bundle, secrets)
    there = [*haproxies(), *ingresses()]
    assert len(there) == 3
    up.stop()
    _, alive = psutil.wait_procs(there, timeout=30)
    assert not alive


def haproxies() -> list[psutil.Process]:
    return [it for it in processes("haproxy.cfg") if it.status() != psutil.STATUS_ZOMBIE]


def ingresses() -> list[psutil.Process]:
    return processes("ServeReplica:manta:api")


def test_openai_s_client_works_through_it(before: Before) -> None:
    api = openai.OpenAI(base_url=f"{before.url}/v1", api_key=before.secrets["alice"], max_retries=0)
    ask = ASK | {"max_tokens": 120}  # more than its reader hears of at once
    whole = api.completions.create(model="writer", **ask)
    parts = list(api.completions.create(model="writer", stream=True, **ask))
    assert whole.usage
    assert whole.usage.completion_tokens == 120
    assert len(parts) > 1
    assert "".join(it.choices[0].text for it in parts) == whole.choices[0].text
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        api.completions.create(model="other", **ASK)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{before.url}/v1", api_key="sk-manta-none", max_retries=0).models.list()
    named = httpx.get(f"{before.url}/healthz", headers={"X-Request-Id": "my-1"})
    assert named.headers.get_list("x-request-id") == ["my-1"]
    unnamed = [httpx.get(f"{before.url}/healthz").headers.get_list("x-request-id") for _ in range(2)]
    assert [len(it) for it in unnamed] == [1, 1]
    assert unnamed[0] != unnamed[1]


def test_keys_limits_hold_over_both_ingresses(before: Before) -> None:
    asked = [before.counts("manta_requests_total", f'key="{key}"') for key in ("bob", "carol")]
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        bob = pool.map(lambda _: before.post("/v1/completions", "bob", ASK).status_code, range(40))
        carol = pool.map(lambda _: before.post("/v1/completions", "carol", ASK | {"max_tokens": 50}).status_code, range(12))  # fmt: skip
        found = [Counter(bob), Counter(carol)]
    took = time.monotonic() - began
    assert LIMIT <= found[0][200] <= LIMIT + took * LIMIT / 60
    assert sorted(found[0]) == [200, 429]
    used = found[1][200] * 52  # of 120, and two come each second; an unfinished one holds 50 and its prompt
    assert 52 <= used <= 120 + 2 * took
    assert sorted(found[1]) == [200, 429]
    wait_for(lambda: sum((before.counts("manta_requests_total", 'key="bob"') - asked[0]).values()) == 40)
    assert len(before.counts("manta_requests_total", 'key="bob"') - asked[0]) == 2  # either has seen some
    assert before.post("/v1/completions", "alice", ASK).status_code == 200


def test_feedback_finds_its_answer_wherever_it_was_given(before: Before) -> None:
    ids = [before.post("/v1/completions", "alice", ASK).json()["id"] for _ in range(6)]
    for number, it in enumerate(ids):
        body = {"request": it, "rating": "up" if number % 2 else "down"}
        assert before.post("/v1/feedback", "dave", body).status_code == 404  # another's
        answer = before.post("/v1/feedback", "alice", body)
        assert (answer.status_code, answer.json()["model"]) == (200, "writer")
    kept = read_records(before.config.run_dir / "feedback", "feedback").to_pylist()
    assert sorted(it["request"] for it in kept) == sorted(it.removeprefix("cmpl-") for it in ids)
    assert {(it["model"], it["version"], it["key"]) for it in kept} == {("writer", before.bundle.hash[:12], "alice")}
    rated = before.counts("manta_feedback_total", 'rating="down"')
    assert (sum(rated.values()), len(before.counts("manta_requests_total", 'key="alice"'))) == (3, 2)


def test_metrics_tell_everything_once_whoever_is_asked(before: Before) -> None:
    of_it = ("manta_requests_total", 'key="dave"', 'path="/v1/completions"')
    wait_for(lambda: sum(before.counts("manta_requests_in_flight").values()) == 1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: before.post("/v1/completions", "dave", ASK), range(10)))
    wait_for(lambda: sum(before.counts(*of_it).values()) == 10)
    tokens = ("manta_tokens_total", 'key="dave"', 'kind="completion"')
    assert {(sum(before.counts(*of_it).values()), sum(before.counts(*tokens).values())) for _ in range(6)} == {(10, 80)}
    assert len(before.counts(*of_it)) == 2
    page = httpx.get(f"{before.url}/metrics", timeout=30).text
    assert len(re.findall(r"^manta_replicas\{", page, re.M)) == 1
    assert len(re.findall(r"^# TYPE manta_requests_total counter", page, re.M)) == 1


def test_nothing_listens_beyond_loopback(before: Before) -> None:
    (haproxy,) = haproxies()
    port = before.config.serve.port
    listens = [it.laddr for it in haproxy.net_connections("inet") if it.status == psutil.CONN_LISTEN]
    assert listens == [("127.0.0.1", port)]
    assert not haproxy.net_connections("unix") or all(not it.laddr for it in haproxy.net_connections("unix"))
    assert listened([haproxy, *processes("ServeReplica")]) == {"127.0.0.1"}
    folder = Path(haproxy.cmdline()[-1]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    for process in ingresses():
        assert port not in {it.laddr.port for it in process.net_connections("inet") if it.status == psutil.CONN_LISTEN}


def test_what_is_too_large_or_slow_is_told_as_ever(before: Before) -> None:
    answer = httpx.post(f"{before.url}/v1/completions", content=b" " * 10_000_000, headers=before.header("alice"), timeout=30)  # fmt: skip
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    with socket.create_connection(("127.0.0.1", before.config.serve.port), timeout=30) as client:
        head = "\r\n".join(f"{name}: {value}" for name, value in before.header("alice").items())
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\nContent-Length: 100\r\n\r\n{{".encode())
        told, _, body = client.recv(4096).partition(b"\r\n\r\n")
        assert b" 408 " in told.splitlines()[0]
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_left_is_noticed_at_once(before: Before, stream: bool) -> None:
    of_it = ("manta_requests_total", 'status="499"', 'key="alice"')
    gone = sum(before.counts(*of_it).values())
    long = ASK | {"max_tokens": 120, "n": 16, "stream": stream, "prompt": [7]}
    pauses = itertools.cycle([0.02, 0.04, 0.06, 0.08, 0.1])

    def leave() -> bool:
        body = json.dumps(long).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {before.secrets['alice']}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", before.config.serve.port), timeout=30) as client:
            client.sendall(head.encode() + body)
            if stream:
                assert b" 200 " in client.recv(4096).splitlines()[0]
            else:
                time.sleep(next(pauses))
        left = time.monotonic()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: sum(before.counts(*of_it).values()) > gone, 1.5)
            print(f"noticed after {time.monotonic() - left:.2f} s")
            return True
        return False

    wait_for(leave)  # tried again where the endpoint was done before it noticed, or hadn't begun
    wait_for(lambda: not running(before), 5)


def running(before: Before) -> float:
    """Return how many completions the replicas have in their forwards."""
    replicas = httpx.get(f"{before.url}/v1/replicas", headers=before.header("alice")).json()["data"]
    return sum(it["running"] + it["waiting"] for it in replicas)


def test_a_thousand_idle_connections_reach_no_ingress(before: Before) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", before.config.serve.port)))
        assert before.post("/v1/completions", "alice", ASK).status_code == 200
        assert sum(len(it.net_connections("unix")) for it in ingresses()) < 200


def test_a_change_in_place_reaches_both_ingresses(before: Before) -> None:
    with load(before.url, ASK | {"model": "writer"}, clients=2) as noted:
        deploy(replace(before.config, serve__max_body_bytes=20_000), {"writer": before.bundle.folder})
        body = {"prompt": "x" * 30_000}
        assert {before.post("/v1/completions", "alice", body).status_code for _ in range(8)} == {413}
        wait_for(lambda: len(noted) > 10)
    assert {it.status for it in noted} == {401}  # of an ingress, each: none was refused a connection
    deploy(before.config, {"writer": before.bundle.folder})
    for options, told in (({"serve.ingresses": 3}, "serve.ingresses=2"), ({"serve.haproxy": False, "serve.ingresses": 1}, "serve.haproxy=true"), ({"serve.body_timeout_s": 9.0}, "serve.body_timeout_s=2.0")):  # fmt: skip
        with pytest.raises(UserError, match=f"has {told}, which can't change while it is up"):
            deploy(with_values(before.config, options), {"writer": before.bundle.folder})


def test_contradictions_are_refused(tiny: Config) -> None:
    with pytest.raises(UserError, match=r"serve.ingresses 2 need HAProxy in front of them: add serve.haproxy=true"):
        with_values(tiny, {"serve.ingresses": 2})
    with pytest.raises(UserError, match=r"serve.haproxy is for an endpoint that `manta deploy` starts"):
        with_values(tiny, {"serve.haproxy": True, "serve.export": "out"})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_haproxy_takes_its_configuration(program: str, tmp_path: Path, host: str) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(configuration(host, free_port(), [str(tmp_path / "0.sock")], write_errors(tmp_path), 30, 60))
    checked = subprocess.run([program, "-c", "-f", str(file)], capture_output=True, text=True)
    assert (checked.returncode, "WARNING" in checked.stderr) == (0, False), checked.stderr


@pytest.mark.slow
def test_no_request_is_lost_with_an_ingress(before: Before) -> None:
    noted: list[int] = []
    client = httpx.Client(base_url=before.url, headers=before.header("alice"), timeout=90)

    def ask(_: int) -> tuple[float, int, str]:
        began = time.monotonic()
        answer = client.post("/v1/completions", json=ASK)
        noted.append(answer.status_code)
        return time.monotonic() - began, answer.status_code, answer.text

    with client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, i) for i in range(600)]
        wait_for(lambda: len(noted) > 60)
        lost = ingresses()[0]
        lost.kill()
        found = [it.result() for it in asked]
    assert {status for _, status, _ in found} == {200}, [it for it in found if it[1] != 200][:3]
    print(f"an ingress killed: none of {len(found)} lost, the slowest took {max(it[0] for it in found):.2f} s")
    wait_for(lambda: len(ingresses()) == 2 and lost.pid not in {it.pid for it in ingresses()})
    wait_for(lambda: before.post("/v1/completions", "dave", ASK).status_code == 200 and len(before.counts("manta_requests_in_flight")) == 2)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", ["haproxy.cfg", "ServeReplica:manta-balancer"])
def test_haproxy_is_started_again(before: Before, what: str) -> None:
    lost = processes(what)[-1]
    (old,) = haproxies()
    killed = time.monotonic()
    lost.kill()
    wait_for(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, 5)

    def back() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return before.post("/v1/completions", "alice", ASK).status_code == 200
        return False

    wait_for(back, 60)
    took = time.monotonic() - killed
    print(f"{what} killed: back after {took:.2f} s")
    assert took < (2 if what == "haproxy.cfg" else 30)
    (new,) = haproxies()
    assert new.pid != old.pid


@pytest.mark.slow
def test_a_stream_in_flight_ends_with_its_ingress(before: Before) -> None:
    body = ASK | {"stream": True, "max_tokens": 120, "n": 16}
    before_kill = before.counts("manta_requests_in_flight")
    assert len(before_kill) == 2
    with httpx.stream("POST", f"{before.url}/v1/completions", json=body, headers=before.header("alice"), timeout=30) as answer:  # fmt: skip
        lines = answer.iter_lines()
        next(lines)
        for process in ingresses():
            process.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    statuses: set[int] = set()

    def back() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            answer = before.post("/v1/completions", "alice", ASK)
            statuses.add(answer.status_code)
            if answer.status_code == 503:
                assert (answer.headers["Retry-After"], answer.json()["error"]["type"]) == ("1", "server_error")
            return answer.status_code == 200
        return False

    wait_for(back)
    assert statuses <= {200, 503}  # no connection was refused meanwhile
    wait_for(lambda: len(before.counts("manta_requests_in_flight")) == 2)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_deployment(program: str, tiny: Config, tmp_path: Path, end: signal.Signals) -> None:
    bundle, port = fresh_bundle(tiny, tmp_path / "writer" / "bundle"), free_port()
    command = [sys.executable, "-m", "jobs.manta", "deploy", f"bundle={bundle.folder}", f"serve.port={port}",
               "serve.haproxy=true", "serve.ingresses=2", "serve.max_replicas=1", "tracking.enabled=false"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said, children = "", list[psutil.Process]()
        try:
            said = said_until(process, "Ctrl-C ends it")
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            children = psutil.Process(process.pid).children(recursive=True)
            assert [it.name() for it in children].count("haproxy") == 1
        finally:
            process.send_signal(end)
        said += process.communicate(timeout=120)[0] or ""
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL), said
    assert "Traceback" not in said
    if end == signal.SIGKILL:  # Ray's own agents take their time
        children = [it for it in children if it.name() == "haproxy" or "Serve" in it.name()]
        assert len(children) >= 6
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [it.cmdline()[:3] for it in alive]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)

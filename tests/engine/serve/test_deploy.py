"""An endpoint changes what it serves while clients send requests: at once, by canary, with a shadow, and by rollback."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engine.bundles.bundle import Bundle, BundleInfo, write_bundle
from engine.config import Config, replace, with_values
from engine.errors import UserError
from engine.serve.deploy import Endpoint, deploy, follow_rollouts, roll_back
from engine.serve.routing.rollout import hash_fraction
from engine.serve.serve_client import controller_state
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import background_load, processes, wait_for
from tests.ports import free_port

REQUEST = {"model": "writer", "prompt": "import os", "max_tokens": 4, "temperature": 0}
POISON = "~"  # a character for which the bad bundle fails


@pytest.fixture(scope="module")
def bundles(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Three bundles with different weights; "bad" verifies and replays, but fails for prompts with POISON."""
    folder = tmp_path_factory.mktemp("deploy")
    untied = with_values(tiny, {"model.tie_word_embeddings": False})
    bundles = {name: fresh_bundle(untied, folder / name / "bundle", seed) for seed, name in enumerate(["one", "two"])}
    model, objective = bundles["one"].model(), bundles["one"].objective()
    manifest = bundles["one"].manifest
    assert manifest
    (token,) = objective.tokenizer(POISON)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan  # type: ignore[operator]
    golden = [entry["request"] for entry in manifest.golden]
    assert not any(POISON in json.dumps(request) for request in golden)
    bundles["bad"] = write_bundle(folder / "bad" / "bundle", model, objective, BundleInfo("bad", golden))  # fmt: skip
    return bundles


@pytest.fixture(scope="module")
def config(tiny: Config) -> Config:
    options = {"serve.canary_stages": [0.3, 1.0], "serve.canary_requests": 15, "serve.canary_stage_s": 0.5,
             "serve.canary_latency_margin": 5.0, "serve.max_replicas": 1, "serve.keep_warm_s": 120.0, "name": "deploy",
             "serve.shadow_requests": 10, "serve.max_num_seqs": 4}  # fmt: skip
    return with_values(tiny, {"serve.port": free_port(), **options})


@pytest.fixture(scope="module")
def endpoint(ray: None, config: Config, bundles: dict[str, Bundle]) -> Iterator[Endpoint]:
    endpoint = deploy(config, {"writer": bundles["one"].folder})
    yield endpoint
    endpoint.stop()


def replica_pids() -> set[int]:
    """Return the processes of all replicas, those kept warm too."""
    return {process.pid for process in processes("bundle-writer")}


def served_model(endpoint: Endpoint) -> dict[str, Any]:
    model: dict[str, Any]
    (model,) = httpx.get(f"{endpoint.url}/v1/models").json()["data"]
    return model


def test_replacing_and_rolling_back_lose_no_request(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]
) -> None:
    before = served_model(endpoint)
    with background_load(endpoint.url, REQUEST) as requests:
        wait_for(lambda: len(requests) > 20)
        deploy(
            replace(config, serve__max_body_bytes=2**19), {"writer": bundles["two"].folder}
        )  # also changes the ingress
        assert served_model(endpoint)["hash"] == bundles["two"].hash
        assert httpx.post(f"{endpoint.url}/v1/completions", content=b" " * (2**19 + 1)).status_code == 413
        changed_at, num_requests = time.monotonic(), len(requests)
        wait_for(lambda: len(requests) > num_requests + 20)
        rollback_started_at, pids = time.monotonic(), replica_pids()
        assert roll_back(config, "writer") == (bundles["two"].hash, bundles["one"].hash)
        rolled_back_at = time.monotonic()
        num_requests = len(requests)
        wait_for(lambda: len(requests) > num_requests + 20)
    assert {request.status for request in requests} == {200}
    after = served_model(endpoint)
    assert (before["hash"], after["hash"], after["version"]) == (
        bundles["one"].hash,
        bundles["one"].hash,
        before["version"],
    )
    assert {request.version for request in requests if request.started_at > rolled_back_at} == {before["version"]}
    between = [
        request for request in requests if request.started_at > changed_at and request.finished_at < rollback_started_at
    ]
    assert len({request.version for request in between}) == 1
    assert {request.version for request in between}.isdisjoint({before["version"]})
    texts = {request.version: request.body["choices"][0]["text"] for request in requests}
    assert len(set(texts.values())) == 2
    assert rolled_back_at - rollback_started_at < 30
    assert replica_pids() == pids  # none was started
    assert [event["event"] for event in after["events"]] == ["promoted"] * 3


def test_bundle_that_fails_its_replay_gets_no_traffic(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    model, objective = bundles["two"].model(), bundles["two"].objective()
    assert bundles["two"].manifest
    golden = [it["request"] for it in bundles["two"].manifest.golden]
    altered = write_bundle(tmp_path / "bundle", model, objective, BundleInfo("altered", golden))
    manifest = json.loads((altered.folder / "manta.json").read_text())
    manifest["golden"][0]["output"]["logprobs"][0] += 0.5
    manifest["hash"] = ""
    from engine.bundles.bundle import Manifest

    manifest["hash"] = Manifest(**manifest).content_hash()
    (altered.folder / "manta.json").write_text(json.dumps(manifest))
    before = served_model(endpoint)
    with background_load(endpoint.url, REQUEST, clients=2) as requests:
        with pytest.raises(UserError, match="does not reproduce its golden outputs"):
            deploy(config, {"writer": altered.folder})
        num_requests = len(requests)
        wait_for(lambda: len(requests) > num_requests + 5)
    assert {(request.status, request.version) for request in requests} == {(200, before["version"])}
    assert served_model(endpoint) == before


def test_good_canary_is_promoted_by_stages(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    old = served_model(endpoint)["version"]
    with background_load(endpoint.url, REQUEST, clients=3) as requests:  # for latencies to compare with
        wait_for(lambda: len(requests) > 40)
    deploy(replace(config, serve__strategy="canary"), {"writer": bundles["two"].folder})
    trial = served_model(endpoint)["trial"]  # it stays until it has answered enough requests
    assert (trial["hash"], trial["share"]) == (bundles["two"].hash, 0.3)
    new = trial["version"]
    output: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow_rollouts, ["writer"])
        wait_for(lambda: output.append(capsys.readouterr().out) or "canary" in "".join(output))  # type: ignore[func-returns-value]
        with background_load(endpoint.url, REQUEST, clients=3) as requests:
            assert following.result(120) == 0
    assert {request.status for request in requests} == {200}
    wait_for(
        lambda: served_model(endpoint)["trial"] is None
    )  # the ingress follows the controller within a report period
    assert (served_model(endpoint)["hash"], served_model(endpoint)["version"]) == (bundles["two"].hash, new)
    in_share = {request.user for request in requests if hash_fraction(new, request.user) < 0.3}
    assert {request.version for request in requests if request.user in in_share} == {new}
    others = [request for request in requests if request.user not in in_share]
    assert {request.version for request in others} <= {old, new}
    promoted_at = min(
        (request.finished_at for request in others if request.version == new), default=math.inf
    )  # at the latest
    assert max(request.started_at for request in others if request.version == old) < promoted_at
    assert sum(request.user in in_share and request.started_at < promoted_at for request in requests) >= 15
    printed = "".join([*output, capsys.readouterr().out])
    assert f"writer  canary {new}: 30% of the traffic" in printed
    assert f"writer  promoted {new}: " in printed
    events = [json.loads(line) for line in (config.run_dir / "rollout.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events[-2:]] == ["canary", "promoted"]


def test_bad_canary_is_withdrawn_and_fails_no_request(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]
) -> None:
    before = served_model(endpoint)
    canary = with_values(config, {"serve.strategy": "canary", "serve.canary_requests": 1000})
    with background_load(endpoint.url, REQUEST | {"prompt": f"x {POISON} y"}, clients=3) as requests:
        deploy(canary, {"writer": bundles["bad"].folder})
        assert follow_rollouts(["writer"]) == 3
        num_requests = len(requests)
        wait_for(lambda: len(requests) > num_requests + 5)
    assert {request.status for request in requests} == {200}
    after = served_model(endpoint)
    assert (after["hash"], after["trial"]) == (before["hash"], None)
    assert after["events"][-1]["event"] == "withdrawn"
    assert after["events"][-1]["bundle"] == bundles["bad"].hash
    assert after["events"][-1]["reason"].startswith("errors: ")


@pytest.mark.slow
def test_shadow_is_compared_and_answers_no_request(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]
) -> None:
    before = served_model(endpoint)
    old, stable = before["version"], next(bundle for bundle in bundles.values() if bundle.hash == before["hash"])
    shadow = replace(config, serve__strategy="shadow")
    # The weights of the stable version with another option: another version with the same answers.
    same = with_values(shadow, {"serve.max_batched_tokens": 64})
    with background_load(endpoint.url, REQUEST | {"stream": False}, clients=2) as requests:
        deploy(same, {"writer": stable.folder})
        assert follow_rollouts(["writer"]) == 3
    assert {(request.status, request.version) for request in requests} == {(200, old)}
    comparison = served_model(endpoint)["events"][-2]
    assert comparison["event"] == "compared"
    assert ", 0 failed, " in comparison["reason"]
    assert "answers identical (100.0%)" in comparison["reason"]


def test_users_stay_with_their_version(endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]) -> None:
    canary = with_values(config, {"serve.strategy": "canary", "serve.canary_stages": [0.5, 1.0], "serve.canary_requests": 10**6})  # fmt: skip
    deploy(canary, {"writer": bundles["one"].folder})

    def version(user: str) -> str:
        answer = httpx.post(f"{endpoint.url}/v1/completions", json=REQUEST | {"user": user}, timeout=60)
        return str(answer.headers["x-manta-version"])

    versions = {user: version(user) for user in map(str, range(24))}
    assert len(set(versions.values())) == 2
    assert {user: version(user) for user in versions} == versions
    headers = {"Authorization": "Bearer k", "x-request-id": "1"}
    by_key = {httpx.post(f"{endpoint.url}/v1/completions", json=REQUEST, headers=headers, timeout=60).headers["x-manta-version"] for _ in range(4)}  # fmt: skip
    assert len(by_key) == 1
    roll_back(config, "writer")
    assert served_model(endpoint)["trial"] is None


def test_canary_with_bad_ratings_is_withdrawn(endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]) -> None:
    before = served_model(endpoint)
    other = next(bundles[name] for name in ("one", "two") if bundles[name].hash != before["hash"])
    canary = with_values(config, {"serve.strategy": "canary", "serve.canary_stages": [0.5, 1.0], "serve.canary_requests": 10**6})  # fmt: skip
    deploy(canary, {"writer": other.folder})
    new = served_model(endpoint)["trial"]["version"]
    users = map(str, itertools.count())

    def withdrawn() -> bool:
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:
            answer = client.post("/v1/completions", json=REQUEST | {"user": next(users)})
            rating = "down" if answer.headers["x-manta-version"] == new else "up"
            client.post("/v1/feedback", json={"request": answer.json()["id"], "rating": rating}).raise_for_status()
        return served_model(endpoint)["trial"] is None

    wait_for(withdrawn)
    after = served_model(endpoint)
    assert (after["hash"], after["events"][-1]["event"]) == (before["hash"], "withdrawn")
    assert after["events"][-1]["reason"].startswith("bad ratings: ")
    assert httpx.get(f"{endpoint.url}/readyz").status_code == 200


@pytest.mark.slow
def test_killed_controller_resumes(endpoint: Endpoint, config: Config) -> None:
    before = served_model(endpoint)
    with background_load(endpoint.url, REQUEST, clients=2) as requests:
        (killed,) = processes("ServeReplica:manta-controller")
        killed.kill()

        assert controller_state().revision  # of its successor
        assert killed.pid not in {process.pid for process in processes("ServeReplica:manta-controller")}
    assert {request.status for request in requests} == {200}
    assert served_model(endpoint) == before


def test_cluster_has_one_endpoint(endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]) -> None:
    with pytest.raises(UserError, match=f"an endpoint is up at {endpoint.url}, and a cluster has one: use serve.port="):
        deploy(replace(config, serve__port=free_port()), {"writer": bundles["one"].folder})
    with pytest.raises(UserError, match="serves writer, not other: nothing can be rolled back"):
        roll_back(config, "other")
    huge = replace(config, serve__cpus_per_replica=3.9)
    with pytest.raises(UserError, match="left beside the present versions"):
        deploy(huge, {"writer": bundles["one"].folder})

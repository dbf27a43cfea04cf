"""An endpoint changes what it serves while clients ask: at once, by a canary, with a shadow, and back."""

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

from engine.bundles.bundle import Bundle, write_bundle
from engine.config import Config, replace, with_values
from engine.errors import UserError
from engine.serve.deploy import Endpoint, deploy, follow_rollouts, roll_back
from engine.serve.routing.rollout import hash_fraction
from engine.serve.serve_client import controller_state
from tests.engine.bundles.making import fresh_bundle
from tests.engine.serve.clients import load, processes, wait_for
from tests.ports import free_port

ASK = {"model": "writer", "prompt": "import os", "max_tokens": 4, "temperature": 0}
POISON = "~"  # a character that the bad bundle cannot read


@pytest.fixture(scope="module")
def bundles(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Three with other weights each; the last one verifies and replays, and fails where a prompt has POISON."""
    folder = tmp_path_factory.mktemp("change")
    untied = with_values(tiny, {"model.tie_word_embeddings": False})
    made = {name: fresh_bundle(untied, folder / name / "bundle", seed) for seed, name in enumerate(["one", "two"])}
    model, objective = made["one"].model(), made["one"].objective()
    manifest = made["one"].manifest
    assert manifest
    (token,) = objective.tokenizer(POISON)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan  # type: ignore[operator]
    golden = [it["request"] for it in manifest.golden]
    assert not any(POISON in json.dumps(request) for request in golden)
    made["bad"] = write_bundle(folder / "bad" / "bundle", model=model, objective=objective, name="bad", golden_requests=golden)  # fmt: skip
    return made


@pytest.fixture(scope="module")
def config(tiny: Config) -> Config:
    quick = {"serve.canary_stages": [0.3, 1.0], "serve.canary_requests": 15, "serve.canary_stage_s": 0.5,
             "serve.canary_latency_margin": 5.0, "serve.max_replicas": 1, "serve.keep_warm_s": 120.0, "name": "change",
             "serve.shadow_requests": 10, "serve.max_num_seqs": 4}  # fmt: skip
    return with_values(tiny, {"serve.port": free_port(), **quick})


@pytest.fixture(scope="module")
def endpoint(ray: None, config: Config, bundles: dict[str, Bundle]) -> Iterator[Endpoint]:
    up = deploy(config, {"writer": bundles["one"].folder})
    yield up
    up.stop()


def replicas() -> set[int]:
    """Return the processes that write, those kept warm too."""
    return {it.pid for it in processes("bundle-writer")}


def standing(endpoint: Endpoint) -> dict[str, Any]:
    (model,) = httpx.get(f"{endpoint.url}/v1/models").json()["data"]
    found: dict[str, Any] = model
    return found


def test_a_change_at_once_loses_nothing_and_so_does_the_way_back(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]
) -> None:
    before = standing(endpoint)
    with load(endpoint.url, ASK) as noted:
        wait_for(lambda: len(noted) > 20)
        deploy(replace(config, serve__max_body_bytes=2**19), {"writer": bundles["two"].folder})  # and the ingress
        assert standing(endpoint)["hash"] == bundles["two"].hash
        assert httpx.post(f"{endpoint.url}/v1/completions", content=b" " * (2**19 + 1)).status_code == 413
        changed, asked = time.monotonic(), len(noted)
        wait_for(lambda: len(noted) > asked + 20)
        began, there = time.monotonic(), replicas()
        assert roll_back(config, "writer") == (bundles["two"].hash, bundles["one"].hash)
        back = time.monotonic()
        asked = len(noted)
        wait_for(lambda: len(noted) > asked + 20)
    assert {it.status for it in noted} == {200}
    after = standing(endpoint)
    assert (before["hash"], after["hash"], after["version"]) == (
        bundles["one"].hash,
        bundles["one"].hash,
        before["version"],
    )
    assert {it.version for it in noted if it.began > back} == {before["version"]}
    between = [it for it in noted if it.began > changed and it.ended < began]
    assert len({it.version for it in between}) == 1
    assert {it.version for it in between}.isdisjoint({before["version"]})
    texts = {it.version: it.body["choices"][0]["text"] for it in noted}
    assert len(set(texts.values())) == 2
    assert back - began < 30
    assert replicas() == there  # it took no longer than telling the ingress: none was started
    assert [event["event"] for event in after["events"]] == ["promoted"] * 3


def test_one_that_does_not_answer_as_recorded_never_takes_traffic(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    model, objective = bundles["two"].model(), bundles["two"].objective()
    assert bundles["two"].manifest
    golden = [it["request"] for it in bundles["two"].manifest.golden]
    liar = write_bundle(tmp_path / "bundle", model=model, objective=objective, name="liar", golden_requests=golden)
    manifest = json.loads((liar.folder / "manta.json").read_text())
    manifest["golden"][0]["output"]["logprobs"][0] += 0.5
    manifest["hash"] = ""
    from engine.bundles.bundle import Manifest

    manifest["hash"] = Manifest(**manifest).content_hash()
    (liar.folder / "manta.json").write_text(json.dumps(manifest))
    before = standing(endpoint)
    with load(endpoint.url, ASK, clients=2) as noted:
        with pytest.raises(UserError, match="does not answer as recorded"):
            deploy(config, {"writer": liar.folder})
        asked = len(noted)
        wait_for(lambda: len(noted) > asked + 5)
    assert {(it.status, it.version) for it in noted} == {(200, before["version"])}
    assert standing(endpoint) == before


def test_a_good_canary_takes_over_by_stages(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    old = standing(endpoint)["version"]
    with load(endpoint.url, ASK, clients=3) as noted:  # by what the old one takes, the new one is judged
        wait_for(lambda: len(noted) > 40)
    deploy(replace(config, serve__strategy="canary"), {"writer": bundles["two"].folder})
    trial = standing(endpoint)["trial"]  # it stands until it has answered enough
    assert (trial["hash"], trial["share"]) == (bundles["two"].hash, 0.3)
    new = trial["version"]
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow_rollouts, ["writer"])
        wait_for(lambda: said.append(capsys.readouterr().out) or "canary" in "".join(said))  # type: ignore[func-returns-value]
        with load(endpoint.url, ASK, clients=3) as noted:
            assert following.result(120) == 0
    assert {it.status for it in noted} == {200}
    assert (standing(endpoint)["hash"], standing(endpoint)["version"]) == (bundles["two"].hash, new)
    first = {it.user for it in noted if hash_fraction(new, it.user) < 0.3}
    assert {it.version for it in noted if it.user in first} == {new}
    later = [it for it in noted if it.user not in first]
    assert {it.version for it in later} <= {old, new}
    alone = min((it.ended for it in later if it.version == new), default=math.inf)  # at the latest
    assert max(it.began for it in later if it.version == old) < alone
    assert sum(it.user in first and it.began < alone for it in noted) >= 15
    told_of = "".join([*said, capsys.readouterr().out])
    assert f"writer  canary {new}: 30% of the traffic" in told_of
    assert f"writer  promoted {new}: " in told_of
    events = [json.loads(line) for line in (config.run_dir / "rollout.jsonl").read_text().splitlines()]
    assert [it["event"] for it in events[-2:]] == ["canary", "promoted"]


def test_a_bad_canary_is_withdrawn_and_harms_nobody(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]
) -> None:
    before = standing(endpoint)
    canary = with_values(config, {"serve.strategy": "canary", "serve.canary_requests": 1000})
    with load(endpoint.url, ASK | {"prompt": f"x {POISON} y"}, clients=3) as noted:
        deploy(canary, {"writer": bundles["bad"].folder})
        assert follow_rollouts(["writer"]) == 3
        asked = len(noted)
        wait_for(lambda: len(noted) > asked + 5)
    assert {it.status for it in noted} == {200}
    after = standing(endpoint)
    assert (after["hash"], after["trial"]) == (before["hash"], None)
    assert after["events"][-1]["event"] == "withdrawn"
    assert after["events"][-1]["bundle"] == bundles["bad"].hash
    assert after["events"][-1]["reason"].startswith("errors: ")


@pytest.mark.slow
def test_a_shadow_is_compared_and_answers_nobody(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]
) -> None:
    before = standing(endpoint)
    old, answering = before["version"], next(it for it in bundles.values() if it.hash == before["hash"])
    shadow = replace(config, serve__strategy="shadow")
    # The same weights as what answers, under another option: as good as the same.
    same = with_values(shadow, {"serve.max_batched_tokens": 64})
    with load(endpoint.url, ASK | {"stream": False}, clients=2) as noted:
        deploy(same, {"writer": answering.folder})
        assert follow_rollouts(["writer"]) == 3
    assert {(it.status, it.version) for it in noted} == {(200, old)}
    told_of = standing(endpoint)["events"][-2]
    assert told_of["event"] == "compared"
    assert ", 0 failed, " in told_of["reason"]
    assert "answers identical (100.0%)" in told_of["reason"]


def test_users_stay_with_their_version(endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]) -> None:
    canary = with_values(config, {"serve.strategy": "canary", "serve.canary_stages": [0.5, 1.0], "serve.canary_requests": 10**6})  # fmt: skip
    deploy(canary, {"writer": bundles["one"].folder})

    def version(user: str) -> str:
        answer = httpx.post(f"{endpoint.url}/v1/completions", json=ASK | {"user": user}, timeout=60)
        return str(answer.headers["x-manta-version"])

    first = {user: version(user) for user in map(str, range(24))}
    assert len(set(first.values())) == 2
    assert {user: version(user) for user in first} == first
    headers = {"Authorization": "Bearer k", "x-request-id": "1"}
    by_key = {httpx.post(f"{endpoint.url}/v1/completions", json=ASK, headers=headers, timeout=60).headers["x-manta-version"] for _ in range(4)}  # fmt: skip
    assert len(by_key) == 1
    roll_back(config, "writer")
    assert standing(endpoint)["trial"] is None


def test_a_canary_that_users_rate_bad_is_withdrawn(
    endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]
) -> None:
    before = standing(endpoint)
    other = next(bundles[name] for name in ("one", "two") if bundles[name].hash != before["hash"])
    canary = with_values(config, {"serve.strategy": "canary", "serve.canary_stages": [0.5, 1.0], "serve.canary_requests": 10**6})  # fmt: skip
    deploy(canary, {"writer": other.folder})
    new = standing(endpoint)["trial"]["version"]
    users = map(str, itertools.count())

    def withdrawn() -> bool:
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:
            answer = client.post("/v1/completions", json=ASK | {"user": next(users)})
            rating = "down" if answer.headers["x-manta-version"] == new else "up"
            client.post("/v1/feedback", json={"request": answer.json()["id"], "rating": rating}).raise_for_status()
        return standing(endpoint)["trial"] is None

    wait_for(withdrawn)
    after = standing(endpoint)
    assert (after["hash"], after["events"][-1]["event"]) == (before["hash"], "withdrawn")
    assert after["events"][-1]["reason"].startswith("bad ratings: ")
    assert httpx.get(f"{endpoint.url}/readyz").status_code == 200


@pytest.mark.slow
def test_the_steward_is_killed_and_goes_on(endpoint: Endpoint, config: Config) -> None:
    before = standing(endpoint)
    with load(endpoint.url, ASK, clients=2) as noted:
        (lost,) = processes("ServeReplica:manta-controller")
        lost.kill()

        assert controller_state().revision  # of its successor
        assert lost.pid not in {it.pid for it in processes("ServeReplica:manta-controller")}
    assert {it.status for it in noted} == {200}
    assert standing(endpoint) == before


def test_one_port_is_one_endpoint(endpoint: Endpoint, config: Config, bundles: dict[str, Bundle]) -> None:
    with pytest.raises(UserError, match=f"an endpoint is up at {endpoint.url}, and a cluster has one: use serve.port="):
        deploy(replace(config, serve__port=free_port()), {"writer": bundles["one"].folder})
    with pytest.raises(UserError, match="serves writer, not other: nothing can be rolled back"):
        roll_back(config, "other")
    huge = replace(config, serve__cpus_per_replica=3.9)
    with pytest.raises(UserError, match="left beside the present versions"):
        deploy(huge, {"writer": bundles["one"].folder})

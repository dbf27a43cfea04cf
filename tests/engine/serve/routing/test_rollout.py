"""The rules of rollouts, without a cluster."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace

import pytest

from engine.serve.jobs import ImageSize, ModelInfo
from engine.serve.routing.messages import ShadowComparison, Version
from engine.serve.routing.rollout import (
    RolloutPlan,
    ServedModel,
    choose_version,
    compare_answers,
    from_json,
    to_json,
)
from engine.serve.routing.sequential_test import CanaryRules, Outcome

INFO = ModelInfo("images", "hash-new", 64, 512, False, adapters={"poet": "hash-poet"}, image=ImageSize(64, 16))
OLD = Version("old", "manta-m-old", "hash-old", "/old", {})
NEW = Version("new", "manta-m-new", "hash-new", "/new", {}, INFO)
PLAN = RolloutPlan("canary", CanaryRules((0.05, 0.5, 1.0), 10, 5.0, 0.01), 0.01, 0.2, 1.0, 3, 600.0)
FINE, FAILED = Outcome(False, 1.0), Outcome(True, 0.0)


def model_with_canary() -> ServedModel:
    model = ServedModel("m", OLD, latencies_s=[1.0] * 100)
    model.deploy(NEW, PLAN, now=0.0)
    return model


def test_key_stays_with_its_version_while_the_share_grows() -> None:
    model, keys = model_with_canary(), [f"user {i}" for i in range(4000)]
    assert model.rollout
    assigned = []
    for _ in range(2):
        route = model.route()
        assigned.append({key for key in keys if choose_version(route, key).id == "new"})
        sent = pickle.loads(pickle.dumps(route))
        assert assigned[-1] == {key for key in keys if choose_version(sent, key).id == "new"}
        model.rollout.stage += 1
    assert assigned[0] < assigned[1]
    assert [len(of_stage) / 4000 for of_stage in assigned] == pytest.approx([0.05, 0.5], abs=0.03)
    model.rollout = None
    assert Counter(choose_version(model.route(), key).id for key in keys) == {"old": 4000}


def test_another_rollout_draws_other_keys() -> None:
    model, keys = model_with_canary(), [f"user {i}" for i in range(4000)]
    first = {key for key in keys if choose_version(model.route(), key).id == "new"}
    model.deploy(replace(NEW, id="newer", app="manta-m-newer"), PLAN, now=1.0)
    second = {key for key in keys if choose_version(model.route(), key).id == "newer"}
    assert len(first & second) < 0.3 * len(first)
    assert [event.event for event in model.events] == ["canary", "withdrawn", "canary"]


def test_good_canary_advances_through_the_stages() -> None:
    model = model_with_canary()
    actions = []
    for second in range(1, 15):
        decision = model.update([FINE] * 20, [FINE] * 4, [], [], float(second))
        actions.append(decision.action if decision else None)
    assert actions == ["hold"] * 4 + ["advance"] + ["hold"] * 4 + ["advance"] + [None] * 4
    assert (model.stable, model.rollout, model.previous) == (NEW, None, [OLD])
    assert [event.event for event in model.events] == ["canary", "canary", "promoted"]
    assert model.warm_until == {OLD.app: 610.0}
    assert model.pop_expired(609.0) == []
    assert model.pop_expired(610.0) == [OLD.app]
    assert model.warm_until == {}


def test_canary_with_all_of_the_traffic() -> None:
    model = ServedModel("m", OLD)
    model.deploy(NEW, replace(PLAN, rules=replace(PLAN.rules, stages=(1.0,))), now=0.0)
    assert choose_version(model.route(), "any key").id == "new"
    model.update([], [FINE] * 10, [], [], 6.0)
    assert (model.stable, model.rollout) == (NEW, None)


def test_bad_canary_is_withdrawn_with_a_reason() -> None:
    model = model_with_canary()
    for second in range(1, 4):
        model.update([FINE] * 20, [FAILED] * 4, [], [], float(second))
    assert (model.stable, model.rollout) == (OLD, None)
    assert model.events[-1].event == "withdrawn"
    assert model.events[-1].bundle == "hash-new"
    assert "errors: " in model.events[-1].reason
    assert NEW.app in model.warm_until


def test_state_survives_json_at_any_time() -> None:
    one, other = model_with_canary(), model_with_canary()
    for second in range(1, 15):
        other = from_json(json.loads(json.dumps(to_json({"m": other}))))["m"]
        for model in (one, other):
            model.update([FINE] * 20, [FINE, FINE, FAILED if second == 2 else FINE], [False], [True], float(second))
        assert other == one


def test_rollback_and_redeployment() -> None:
    model = ServedModel("m", OLD)
    replace_plan = replace(PLAN, strategy="replace")
    model.deploy(NEW, replace_plan, 1.0)
    model.deploy(OLD, replace_plan, 2.0)
    assert (model.stable, model.previous, model.warm_until) == (OLD, [NEW], {NEW.app: 602.0})
    model.deploy(OLD, replace_plan, 3.0)
    assert model.events[-1].event == "unchanged"
    assert model.previous == [NEW]


def test_warm_replicas_are_kept_for_a_redeployment() -> None:
    model = ServedModel("m", OLD)
    model.deploy(NEW, replace(PLAN, strategy="replace"), 1.0)
    model.keep_warm([OLD.app, "another app"], 700.0)
    assert model.pop_expired(699.0) == []
    assert model.pop_expired(700.0) == [OLD.app]


def test_shadow_answers_no_request_and_ends_with_a_comparison() -> None:
    model = ServedModel("m", OLD)
    model.deploy(NEW, replace(PLAN, strategy="shadow"), 0.0)
    assert model.rollout
    assert {choose_version(model.route(), str(i)).id for i in range(1000)} == {"old"}
    stats = model.rollout.shadow_stats
    for identical, difference in ((True, 0.25), (True, 0.5), (False, 0.0)):
        stats.add(ShadowComparison(False, identical, difference))
    stats.latencies_s = []
    model.update([], [], [], [], 1.0)
    assert [event.event for event in model.events] == ["shadow", "compared", "withdrawn"]
    assert model.events[1].reason == "3 requests copied, 0 failed, 2 of 3 answers identical (66.7%), scores differ by 0.25 (median), 0.5 (maximum)"  # fmt: skip


def test_answers_are_compared_by_texts_and_floats() -> None:
    old = {"label": "a", "scores": {"a": 0.75, "b": 0.25}, "tokens": 3}
    assert compare_answers([old], [old]) == (True, 0.0)
    assert compare_answers([old], [old | {"scores": {"a": 0.5, "b": 0.5}}]) == (True, 0.25)
    assert compare_answers([old], [old | {"label": "b"}])[0] is False

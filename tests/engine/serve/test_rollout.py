"""The rules by which versions come and go, without a cluster."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from engine.serve.routing.rollout import Model, Plan, Version, chosen, from_plain, likeness, to_plain
from engine.serve.routing.sequential_test import Answer, Rules

OLD = Version("old", "manta-m-old", "hash-old", "/old", {})
NEW = Version("new", "manta-m-new", "hash-new", "/new", {})
PLAN = Plan("canary", Rules((0.05, 0.5, 1.0), 10, 5.0, 0.01), 0.01, 0.2, 1.0, 3, 600.0)
FINE, FAILED = Answer(False, 1.0), Answer(True, 0.0)


def tried() -> Model:
    model = Model("m", OLD, recent=[1.0] * 100)
    model.begin(NEW, PLAN, now=0.0)
    return model


def test_a_key_stays_where_it_is_while_the_share_grows() -> None:
    model, keys = tried(), [f"user {i}" for i in range(4000)]
    assert model.trial
    fallen = []
    for _ in range(2):
        table = model.table()
        fallen.append({key for key in keys if chosen(table, key)["id"] == "new"})
        assert fallen[-1] == {key for key in keys if chosen(json.loads(json.dumps(table)), key)["id"] == "new"}
        model.trial.stage += 1
    assert fallen[0] < fallen[1]
    assert [len(it) / 4000 for it in fallen] == pytest.approx([0.05, 0.5], abs=0.03)
    model.trial = None
    assert Counter(chosen(model.table(), key)["id"] for key in keys) == {"old": 4000}


def test_another_trial_draws_other_keys() -> None:
    model, keys = tried(), [f"user {i}" for i in range(4000)]
    first = {key for key in keys if chosen(model.table(), key)["id"] == "new"}
    model.begin(replace(NEW, id="newer", app="manta-m-newer"), PLAN, now=1.0)
    second = {key for key in keys if chosen(model.table(), key)["id"] == "newer"}
    assert len(first & second) < 0.3 * len(first)
    assert [event["event"] for event in model.events] == ["canary", "withdrawn", "canary"]


def test_a_good_version_goes_through_the_stages() -> None:
    model = tried()
    acts = []
    for second in range(1, 15):
        decision = model.judge([FINE] * 20, [FINE] * 4, [], [], float(second))
        acts.append(decision.act if decision else None)
    assert acts == ["hold"] * 4 + ["advance"] + ["hold"] * 4 + ["advance"] + [None] * 4
    assert (model.stable, model.trial, model.before) == (NEW, None, [OLD])
    assert [event["event"] for event in model.events] == ["canary", "canary", "promoted"]
    assert model.warm == {OLD.app: 610.0}
    assert model.expired(609.0) == []
    assert model.expired(610.0) == [OLD.app]
    assert model.warm == {}


def test_all_at_once_is_a_canary_too() -> None:
    model = Model("m", OLD)
    model.begin(NEW, replace(PLAN, rules=replace(PLAN.rules, stages=(1.0,))), now=0.0)
    assert chosen(model.table(), "anybody")["id"] == "new"
    model.judge([], [FINE] * 10, [], [], 6.0)
    assert (model.stable, model.trial) == (NEW, None)


def test_a_bad_version_is_withdrawn_and_told() -> None:
    model = tried()
    for second in range(1, 4):
        model.judge([FINE] * 20, [FAILED] * 4, [], [], float(second))
    assert (model.stable, model.trial) == (OLD, None)
    assert model.events[-1]["event"] == "withdrawn"
    assert model.events[-1]["bundle"] == "hash-new"
    assert "errors: " in model.events[-1]["reason"]
    assert NEW.app in model.warm


def test_the_state_survives_being_written_down_at_any_time() -> None:
    one, other = tried(), tried()
    for second in range(1, 15):
        other = from_plain(json.loads(json.dumps(to_plain({"m": other}))))["m"]
        for model in (one, other):
            model.judge([FINE] * 20, [FINE, FINE, FAILED if second == 2 else FINE], [False], [True], float(second))
        assert other == one


def test_the_way_back_and_the_same_again() -> None:
    model = Model("m", OLD)
    at_once = replace(PLAN, strategy="replace")
    model.begin(NEW, at_once, 1.0)
    model.begin(OLD, at_once, 2.0)
    assert (model.stable, model.before, model.warm) == (OLD, [NEW], {NEW.app: 602.0})
    model.begin(OLD, at_once, 3.0)
    assert model.events[-1]["event"] == "unchanged"
    assert model.before == [NEW]


def test_what_is_about_to_come_back_is_kept() -> None:
    model = Model("m", OLD)
    model.begin(NEW, replace(PLAN, strategy="replace"), 1.0)
    model.keep([OLD.app, "another's"], 700.0)
    assert model.expired(699.0) == []
    assert model.expired(700.0) == [OLD.app]


def test_a_shadow_answers_nobody_and_ends_with_a_comparison() -> None:
    model = Model("m", OLD)
    model.begin(NEW, replace(PLAN, strategy="shadow"), 0.0)
    assert model.trial
    assert {chosen(model.table(), str(i))["id"] for i in range(1000)} == {"old"}
    agreement = model.trial.agreement
    agreement.copied, agreement.compared, agreement.alike, agreement.distances = 3, 3, 2, [0.25, 0.5, 0.0]
    model.judge([], [], [], [], 1.0)
    assert [event["event"] for event in model.events] == ["shadow", "compared", "withdrawn"]
    assert model.events[1]["reason"] == "3 requests copied, 0 failed, 2 of 3 answers alike (66.7%), scores differ by 0.25 (median), 0.5 (most)"  # fmt: skip


def test_answers_are_compared_by_words_and_numbers() -> None:
    old = {"label": "a", "scores": {"a": 0.75, "b": 0.25}, "tokens": 3}
    assert likeness([old], [old]) == (True, 0.0)
    assert likeness([old], [old | {"scores": {"a": 0.5, "b": 0.5}}]) == (True, 0.25)
    assert likeness([old], [old | {"label": "b"}])[0] is False

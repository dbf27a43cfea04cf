"""The test that withdraws a version: how often it is wrong, how soon it is right, on simulated streams."""

from __future__ import annotations

import math
import random

import pytest

from engine.serve.routing.sequential_test import QUESTIONS, Answer, Evidence, Question, Rules, decide

RULES = Rules(stages=(0.05, 0.25, 0.5, 1.0), requests=200, seconds=0, false_alarm=0.05)
STAGES = [(0.05, 40), (0.25, 40), (0.5, 40)]  # share of the new version, and blocks of 40 requests


def answers(dice: random.Random, count: int, errors: float, slowness: float) -> list[Answer]:
    return [Answer(dice.random() < errors, slowness * dice.lognormvariate(0, 0.8)) for _ in range(count)]


def withdrawn_after(seed: int, errors: float = 0.0, slowness: float = 1.0, bad: float = 0.2, **margins: float) -> int | None:  # fmt: skip
    """Return after how many requests to the new version it is withdrawn; the old one has 2 % errors, 20 % bad ratings."""
    dice = random.Random(seed)
    evidence = Evidence(margins.get("error_margin", 0.0), margins.get("latency_margin", 0.0), seed)
    evidence.recent = [it.pace for it in answers(dice, 100, 0, 1.0)]
    seen = 0
    for share, blocks in STAGES:
        for _ in range(blocks):
            new = sum(dice.random() < share for _ in range(40))
            rated = [dice.random() < 0.2 for _ in range(4)], [dice.random() < bad for _ in range(new // 10)]
            evidence.add(answers(dice, 40 - new, 0.02, 1.0), answers(dice, new, 0.02 + errors, slowness), *rated)
            seen += new
            if decide(evidence, RULES, 0, 0).act == "withdraw":
                return seen
    return None


def test_a_version_as_good_is_seldom_withdrawn() -> None:
    streams = 200
    wrong = sum(withdrawn_after(seed) is not None for seed in range(streams))
    # Looked at 120 times each; by chance alone at most 10 of 200 are expected: 18 would be over it by 2.6 deviations.
    assert wrong <= 18, wrong


def test_fixed_looks_would_be_wrong_more_often() -> None:
    """The same streams of errors, by the usual z-test at each look: this is what the e-process is for."""
    wrong = 0
    for seed in range(200):
        dice = random.Random(seed)
        old, new = [0, 0], [0, 0]
        for _ in range(120):
            for arm in (old, new):
                arm[0] += 20
                arm[1] += sum(dice.random() < 0.1 for _ in range(20))
            p = (old[1] + new[1]) / (old[0] + new[0])
            deviation = math.sqrt(p * (1 - p) * (1 / old[0] + 1 / new[0])) if 0 < p < 1 else math.inf
            if (new[1] / new[0] - old[1] / old[0]) / deviation > 1.645:
                wrong += 1
                break
    assert wrong > 40


@pytest.mark.parametrize(
    ("what", "most"),
    [({"errors": 0.5}, 30), ({"errors": 0.15}, 130), ({"slowness": 3.0}, 60), ({"slowness": 1.6}, 350), ({"bad": 0.8}, 350)],
)  # fmt: skip
def test_a_worse_version_is_withdrawn_soon(what: dict[str, float], most: int) -> None:
    found = [withdrawn_after(seed, **what) for seed in range(20)]
    assert all(after is not None for after in found), found
    assert sorted(after for after in found if after is not None)[10] <= most, found


def test_what_lies_within_the_margins_is_no_reason() -> None:
    margins = {"error_margin": 0.05, "latency_margin": 0.5}
    assert sum(withdrawn_after(seed, errors=0.04, slowness=1.4, **margins) is not None for seed in range(40)) <= 2


def test_the_mean_of_the_evidence_stays_under_one_where_the_shares_are_equal() -> None:
    for share in (0.01, 0.1, 0.5, 0.9):
        total, streams = 0.0, 2000
        for seed in range(streams):
            dice, question = random.Random(seed), Question()
            for _ in range(5):
                question.add(9, sum(dice.random() < share for _ in range(9)), 3, sum(dice.random() < share for _ in range(3)))  # fmt: skip
            total += question.evidence
        assert total / streams < 1.1


def test_one_side_alone_is_no_evidence() -> None:
    question = Question()
    question.add(0, 0, 50, 50)
    question.add(50, 0, 0, 0)
    assert question.evidence == 1


def test_ratings_that_come_one_by_one_are_evidence_too() -> None:
    evidence = Evidence(0.01, 0.2)
    for _ in range(12):
        evidence.add([], [], [False])
        evidence.add([], [], [], [True])
    decision = decide(evidence, RULES, 0, 0)
    assert decision.act == "withdraw"
    assert decision.reason.startswith("bad ratings: 12 of 12 by the new version, 0 of 12 by the old one")


def test_a_stage_needs_its_requests_and_its_time() -> None:
    rules = Rules((0.5, 1.0), requests=100, seconds=60, false_alarm=0.01)
    evidence = Evidence(0.01, 0.2)
    assert [decide(evidence, rules, n, s).act for n, s in [(99, 90), (100, 59), (100, 60)]] == [
        "hold",
        "hold",
        "advance",
    ]
    failed = [Answer(True, 0.0)] * 20
    for _ in range(3):
        evidence.add([Answer(False, 1.0)] * 20, failed)
    decision = decide(evidence, rules, 100, 60)
    assert decision.act == "withdraw"
    assert decision.reason.startswith("errors: 60 of 60 by the new version, ")
    assert set(evidence.questions) == set(QUESTIONS)

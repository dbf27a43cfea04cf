"""The sequential test that withdraws a version: false alarms and detection delay, on simulated streams."""

from __future__ import annotations

import math
import random

import pytest

from engine.serve.routing.sequential_test import CRITERIA, CanaryRules, EProcess, Outcome, SequentialTest, decide

RULES = CanaryRules(stages=(0.05, 0.25, 0.5, 1.0), min_requests=200, min_stage_s=0, false_alarm_rate=0.05)
STAGES = [(0.05, 40), (0.25, 40), (0.5, 40)]  # share of the new version, and blocks of 40 requests


def simulate(rng: random.Random, count: int, errors: float, slowness: float) -> list[Outcome]:
    return [Outcome(rng.random() < errors, slowness * rng.lognormvariate(0, 0.8)) for _ in range(count)]


def requests_until_withdrawn(seed: int, errors: float = 0.0, slowness: float = 1.0, bad: float = 0.2, **margins: float) -> int | None:  # fmt: skip
    """Return after how many requests to the new version it is withdrawn; the stable one has 2% errors, 20% bad ratings."""
    rng = random.Random(seed)
    test = SequentialTest(margins.get("error_margin", 0.0), margins.get("latency_margin", 0.0), seed)
    test.stable_latencies_s = [outcome.latency_s for outcome in simulate(rng, 100, 0, 1.0)]
    num_requests = 0
    for share, blocks in STAGES:
        for _ in range(blocks):
            new = sum(rng.random() < share for _ in range(40))
            rated = [rng.random() < 0.2 for _ in range(4)], [rng.random() < bad for _ in range(new // 10)]
            test.add_block(simulate(rng, 40 - new, 0.02, 1.0), simulate(rng, new, 0.02 + errors, slowness), *rated)
            num_requests += new
            if decide(test, RULES, 0, 0).action == "withdraw":
                return num_requests
    return None


def test_equally_good_version_is_seldom_withdrawn() -> None:
    streams = 200
    false_alarms = sum(requests_until_withdrawn(seed) is not None for seed in range(streams))
    # 120 looks each; at most 10 of 200 false alarms are expected: 18 are 2.6 standard deviations more.
    assert false_alarms <= 18, false_alarms


def test_repeated_z_tests_raise_more_false_alarms() -> None:
    """The same streams of errors with a fixed-sample z-test at each look: the e-process avoids this."""
    false_alarms = 0
    for seed in range(200):
        rng = random.Random(seed)
        old, new = [0, 0], [0, 0]
        for _ in range(120):
            for arm in (old, new):
                arm[0] += 20
                arm[1] += sum(rng.random() < 0.1 for _ in range(20))
            p = (old[1] + new[1]) / (old[0] + new[0])
            deviation = math.sqrt(p * (1 - p) * (1 / old[0] + 1 / new[0])) if 0 < p < 1 else math.inf
            if (new[1] / new[0] - old[1] / old[0]) / deviation > 1.645:
                false_alarms += 1
                break
    assert false_alarms > 40


@pytest.mark.parametrize(
    ("stream", "max_requests"),
    [({"errors": 0.5}, 30), ({"errors": 0.15}, 130), ({"slowness": 3.0}, 60), ({"slowness": 1.6}, 350), ({"bad": 0.8}, 350)],
)  # fmt: skip
def test_worse_version_is_withdrawn_soon(stream: dict[str, float], max_requests: int) -> None:
    requests = [requests_until_withdrawn(seed, **stream) for seed in range(20)]
    assert all(count is not None for count in requests), requests
    assert sorted(count for count in requests if count is not None)[10] <= max_requests, requests


def test_margins_are_tolerated() -> None:
    margins = {"error_margin": 0.05, "latency_margin": 0.5}
    assert (
        sum(requests_until_withdrawn(seed, errors=0.04, slowness=1.4, **margins) is not None for seed in range(40)) <= 2
    )


def test_mean_of_the_e_process_is_at_most_one_for_equal_rates() -> None:
    for share in (0.01, 0.1, 0.5, 0.9):
        total, streams = 0.0, 2000
        for seed in range(streams):
            rng, e_process = random.Random(seed), EProcess()
            for _ in range(5):
                e_process.add_block(9, sum(rng.random() < share for _ in range(9)), 3, sum(rng.random() < share for _ in range(3)))  # fmt: skip
            total += e_process.value
        assert total / streams < 1.1


def test_one_version_alone_is_no_evidence() -> None:
    e_process = EProcess()
    e_process.add_block(0, 0, 50, 50)
    e_process.add_block(50, 0, 0, 0)
    assert e_process.value == 1


def test_single_ratings_are_evidence() -> None:
    test = SequentialTest(0.01, 0.2)
    for _ in range(12):
        test.add_block([], [], [False])
        test.add_block([], [], [], [True])
    decision = decide(test, RULES, 0, 0)
    assert decision.action == "withdraw"
    assert decision.reason.startswith("bad ratings: 12 of 12 by the new version, 0 of 12 by the stable one")


def test_stage_needs_its_requests_and_its_time() -> None:
    rules = CanaryRules((0.5, 1.0), min_requests=100, min_stage_s=60, false_alarm_rate=0.01)
    test = SequentialTest(0.01, 0.2)
    assert [decide(test, rules, n, s).action for n, s in [(99, 90), (100, 59), (100, 60)]] == [
        "hold",
        "hold",
        "advance",
    ]
    failed = [Outcome(True, 0.0)] * 20
    for _ in range(3):
        test.add_block([Outcome(False, 1.0)] * 20, failed)
    decision = decide(test, rules, 100, 60)
    assert decision.action == "withdraw"
    assert decision.reason.startswith("errors: 60 of 60 by the new version, ")
    assert set(test.e_processes) == set(CRITERIA)

"""Rate limits of API keys: requests and tokens per minute, in one process and shared by several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.serve.http.api_keys import ApiKey, sha256_of
from engine.serve.http.rate_limits import RateLimiter


def api_key(requests: int | None = None, tokens: int | None = None) -> ApiKey:
    return ApiKey("alice", sha256_of("x"), 0.0, requests, tokens)


def test_requests_are_limited_per_minute() -> None:
    limiter, alice = RateLimiter(), api_key(requests=6)
    assert [limiter.charge_request(alice, 0.0) for _ in range(7)] == [0.0] * 6 + [10.0]
    assert limiter.charge_request(alice, 9.0) == pytest.approx(1.0)
    assert limiter.charge_request(alice, 10.0) == 0
    assert limiter.charge_request(alice, 1000.0) == 0  # at most a minute's worth accrues
    assert [limiter.charge_request(alice, 1000.0) > 0 for _ in range(6)] == [False] * 5 + [True]
    assert limiter.charge_request(api_key(), 0.0) == 0


def test_tokens_are_reserved_and_settled() -> None:
    limiter, alice = RateLimiter(), api_key(tokens=600)
    assert limiter.reserve_tokens(alice, 500, 0.0) == 0
    assert limiter.reserve_tokens(alice, 200, 0.0) == pytest.approx(10.0)
    limiter.settle_tokens(alice, 500, 100)
    assert limiter.reserve_tokens(alice, 500, 0.0) == 0
    limiter.settle_tokens(alice, 500, 620)  # more than reserved: a debt
    assert limiter.reserve_tokens(alice, 1, 0.0) == pytest.approx((1 + 120) / 10)
    assert limiter.reserve_tokens(alice, 5000, 60.0) == pytest.approx(12.0)  # over the capacity: needs a full bucket
    assert limiter.reserve_tokens(alice, 5000, 72.0) == 0
    assert limiter.reserve_tokens(alice, 1, 72.0) == pytest.approx((5000 - 600 + 1) / 10)


CHARGE_500_REQUESTS = """
import sys
from pathlib import Path
from engine.serve.http.api_keys import ApiKey
from engine.serve.http.rate_limits import RateLimiter
key, limiter = ApiKey("alice", 64 * "0", 0.0, requests_per_minute=600), RateLimiter(Path(sys.argv[1]))
print("ready", flush=True)
input()
print(sum(not limiter.charge_request(key, 1000.0) for _ in range(500)))
"""


def test_processes_share_the_buckets_of_a_key(tmp_path: Path) -> None:
    key = ApiKey("alice", 64 * "0", 0.0, requests_per_minute=600, tokens_per_minute=100)
    command = [sys.executable, "-c", CHARGE_500_REQUESTS, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sum(int(process.communicate(timeout=60)[0]) for process in processes) == 600
    one, other = RateLimiter(tmp_path), RateLimiter(tmp_path)
    assert one.reserve_tokens(key, 80, 1000.0) == 0
    assert other.reserve_tokens(key, 80, 1000.0) == pytest.approx(36)  # 60 of 100 are missing
    other.settle_tokens(key, 80, 20)
    assert one.reserve_tokens(key, 80, 1000.0) == 0

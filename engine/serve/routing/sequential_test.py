"""Is the new version worse than the stable one? A sequential test, valid however often one looks and whenever one stops.

Each answer gives binary outcomes: was it an error, was it slow, was it rated bad. For each criterion an e-process measures
the evidence against the null hypothesis that the new version's rate is not larger. By Ville's inequality (Ville 1939) the
probability under the null hypothesis that it ever reaches 1/alpha is at most alpha.

The e-process is that of Turner, Ly and Grünwald 2021, "Generic E-Variables for Exact Sequential k-Sample Tests that allow
for Optional Stopping", https://arxiv.org/abs/2106.02693, section 2, for two Bernoulli streams. A block holds some outcomes
of both; for alternative rates a (stable) and b > a (new) its factor is the likelihood of the block under (a, b) over that
under one common rate, c = (n_stable a + n_new b) / (n_stable + n_new). The expectation of the factor is at most 1 wherever
both rates are equal, whatever they are (its logarithm is concave in the rate, and 0 with slope 0 at c), and less where the
new one's is smaller: so the rates may drift from block to block. The alternative may depend on earlier blocks. Here it is
a mixture over several odds ratios of b to a.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

ODDS_RATIOS = (1.5, 2.0, 4.0, 16.0, 128.0, 1024.0)  # alternatives: odds of the new version's rate over the stable one's
LATENCY_WINDOW = 500  # answers of the stable version whose quantiles say what is slow
MIN_LATENCIES = 20  # of them, before any answer is called slow
CRITERIA = ("error", "slow", "very slow", "rated bad")
LATENCY_QUANTILES = {"slow": 0.5, "very slow": 0.95}  # criterion -> quantile of the stable version's latencies


@dataclass(frozen=True)
class Outcome:
    """How one request ended."""

    failed: bool
    latency_s: float  # per generated token, or per input


@dataclass
class EProcess:
    """The evidence for one criterion that the new version's rate is larger than the stable one's."""

    num_stable: int = 0  # outcomes
    stable_positives: int = 0
    num_new: int = 0
    new_positives: int = 0
    log_values: list[float] = field(default_factory=lambda: [0.0] * len(ODDS_RATIOS))  # by alternative

    @property
    def value(self) -> float:
        """The mean over the alternatives, which is an e-process, too."""
        largest = max(self.log_values)
        return math.exp(min(largest, 600)) * sum(math.exp(log - largest) for log in self.log_values) / len(self.log_values)  # fmt: skip

    def add_block(self, num_stable: int, stable_positives: int, num_new: int, new_positives: int) -> None:
        """Add a block: number of outcomes of each version, and how many of them were positive."""
        if num_stable and num_new:
            # The estimator of Krichevsky and Trofimov 1981, from earlier blocks only.
            a = (self.stable_positives + 0.5) / (self.num_stable + 1)
            a = min(max(a, 1e-4), 1 - 1e-4)
            for i, ratio in enumerate(ODDS_RATIOS):
                b = ratio * a / (1 - a + ratio * a)
                c = (num_stable * a + num_new * b) / (num_stable + num_new)
                self.log_values[i] += stable_positives * math.log(a / c) + (num_stable - stable_positives) * math.log((1 - a) / (1 - c))  # fmt: skip
                self.log_values[i] += new_positives * math.log(b / c) + (num_new - new_positives) * math.log((1 - b) / (1 - c))  # fmt: skip
        self.num_stable, self.stable_positives = self.num_stable + num_stable, self.stable_positives + stable_positives
        self.num_new, self.new_positives = self.num_new + num_new, self.new_positives + new_positives


@dataclass
class SequentialTest:
    """Compares a new version with the stable one by all criteria."""

    error_margin: float  # error rate that the new version may have beyond the stable one's
    latency_margin: float  # fraction by which it may be slower
    seed: int = 0
    num_blocks: int = 0
    stable_latencies_s: list[float] = field(default_factory=list)  # the latest ones
    e_processes: dict[str, EProcess] = field(default_factory=lambda: {name: EProcess() for name in CRITERIA})
    pending_ratings: list[int] = field(default_factory=lambda: [0] * 4)  # of an incomplete block: as EProcess.add_block

    def add_block(
        self,
        stable: Sequence[Outcome],
        new: Sequence[Outcome],
        stable_bad: Sequence[bool] = (),
        new_bad: Sequence[bool] = (),
    ) -> None:
        """Add outcomes, and ratings (True: bad), that came at about the same time.

        Ratings are rare: those of one version wait for one of the other, as a block of one side is no evidence.
        """
        rng = random.Random(self.seed * 1_000_003 + self.num_blocks)
        self.num_blocks += 1
        # The error margin: with this probability an answer of the stable version counts as an error, though it was none.
        stable_errors = sum(outcome.failed or rng.random() < self.error_margin for outcome in stable)
        new_errors = sum(outcome.failed for outcome in new)
        self.e_processes["error"].add_block(len(stable), stable_errors, len(new), new_errors)
        stable_s, new_s = ([outcome.latency_s for outcome in outcomes if not outcome.failed] for outcomes in (stable, new))  # fmt: skip
        if len(self.stable_latencies_s) >= MIN_LATENCIES:
            ordered = sorted(self.stable_latencies_s)
            for name, quantile in LATENCY_QUANTILES.items():
                limit_s = ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]
                stable_slow = sum(latency > limit_s for latency in stable_s)
                new_slow = sum(latency > limit_s * (1 + self.latency_margin) for latency in new_s)
                self.e_processes[name].add_block(len(stable_s), stable_slow, len(new_s), new_slow)
        self.stable_latencies_s = [*self.stable_latencies_s, *stable_s][-LATENCY_WINDOW:]
        ratings = len(stable_bad), sum(stable_bad), len(new_bad), sum(new_bad)
        self.pending_ratings = [pending + more for pending, more in zip(self.pending_ratings, ratings, strict=True)]
        if self.pending_ratings[0] and self.pending_ratings[2]:
            self.e_processes["rated bad"].add_block(*self.pending_ratings)
            self.pending_ratings = [0] * 4


@dataclass(frozen=True)
class CanaryRules:
    """When a new version advances to a larger share of the traffic."""

    stages: tuple[float, ...]  # shares of the traffic; the last one is 1
    min_requests: int  # answered by the new version, at each stage
    min_stage_s: float
    false_alarm_rate: float  # largest probability that a version as good as the stable one is ever withdrawn


@dataclass(frozen=True)
class Decision:
    """What to do with a new version, and why."""

    action: Literal["withdraw", "advance", "hold"]
    reason: str = ""


def decide(test: SequentialTest, rules: CanaryRules, stage_requests: int, stage_s: float) -> Decision:
    """Decide on a new version that has answered `stage_requests` requests in the `stage_s` seconds of its present stage."""
    for name, e_process in test.e_processes.items():
        if e_process.value >= len(CRITERIA) / rules.false_alarm_rate:  # Bonferroni's correction for several tests
            return Decision("withdraw", describe_evidence(name, e_process))
    if stage_requests >= rules.min_requests and stage_s >= rules.min_stage_s:
        return Decision("advance", f"{stage_requests} more answers, no test finds it worse")
    return Decision("hold")


def describe_evidence(name: str, e_process: EProcess) -> str:
    """Return the evidence of a criterion as a sentence."""
    positives = {
        "error": "errors",
        "slow": "answers slower than the stable version's median and margin",
        "very slow": "answers slower than the stable version's 95th percentile and margin",
        "rated bad": "bad ratings",
    }[name]
    return (
        f"{positives}: {e_process.new_positives} of {e_process.num_new:,} by the new version, "
        f"{e_process.stable_positives} of {e_process.num_stable:,} by the stable one "
        f"(e-value {min(e_process.value, 1e9):.3g})"
    )

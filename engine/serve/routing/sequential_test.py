"""Is the new version worse than the old one? A test that may be looked at after each answer, and ended at any time.

Yes-or-no questions are asked of every answer: was it an error, was it slow, was it rated bad. For each question an e-process
weighs the evidence that the new version's share of yes is larger: a number that stays small while it is not. By Ville's
inequality (Ville 1939) the chance that it ever reaches 1/a is at most a, however often one looks and whenever one stops.

The e-process is that of Turner, Ly and Grünwald 2021, "Generic E-Variables for Exact Sequential k-Sample Tests that allow
for Optional Stopping", https://arxiv.org/abs/2106.02693, section 2, for two streams of yes and no. A block holds some
answers of both; with supposed shares a (old) and b > a (new) its factor is the likelihood of the block under (a, b) over that
under one common share, c = (n_old a + n_new b) / (n_old + n_new). The factor's mean is 1 at most wherever both shares are
equal, whatever they are (its logarithm is concave in the share and flat, at 0, where the share is c), and less where the new
one's is smaller: so the shares may drift from block to block. The supposed ones may come from the blocks before. Here they
are a mixture: several odds of b over those of a.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

ODDS = (1.5, 2.0, 4.0, 16.0, 128.0, 1024.0)  # of yes for the new version, as a multiple of those for the old one
RECENT = 500  # answers of the old version by which the slow ones are told
FEWEST = 20  # of them, before any answer is called slow
QUESTIONS = ("error", "slow", "very slow", "rated bad")
QUANTILES = {"slow": 0.5, "very slow": 0.95}  # of the old version's seconds: over it is a yes


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    failed: bool
    pace: float  # seconds a token written, or a text


@dataclass
class Question:
    """The evidence about one question so far."""

    old: int = 0  # answers
    old_yes: int = 0
    new: int = 0
    new_yes: int = 0
    logs: list[float] = field(default_factory=lambda: [0.0] * len(ODDS))  # log-evidence by supposed odds

    @property
    def evidence(self) -> float:
        """The mean of the e-processes, itself one."""
        top = max(self.logs)
        return math.exp(min(top, 600)) * sum(math.exp(log - top) for log in self.logs) / len(self.logs)

    def add(self, old: int, old_yes: int, new: int, new_yes: int) -> None:
        """Take one block: answers of both versions, and how many of them were yes."""
        if old and new:
            a = (self.old_yes + 0.5) / (
                self.old + 1
            )  # the estimate of Krichevsky and Trofimov 1981, from the past alone
            a = min(max(a, 1e-4), 1 - 1e-4)
            for i, odds in enumerate(ODDS):
                b = odds * a / (1 - a + odds * a)
                c = (old * a + new * b) / (old + new)
                self.logs[i] += old_yes * math.log(a / c) + (old - old_yes) * math.log((1 - a) / (1 - c))
                self.logs[i] += new_yes * math.log(b / c) + (new - new_yes) * math.log((1 - b) / (1 - c))
        self.old, self.old_yes = self.old + old, self.old_yes + old_yes
        self.new, self.new_yes = self.new + new, self.new_yes + new_yes


@dataclass
class Evidence:
    """All that is known of a new version beside the old one."""

    error_margin: float  # error rate that the new one may have beyond the old one's
    latency_margin: float  # share by which it may be slower
    seed: int = 0
    blocks: int = 0
    recent: list[float] = field(default_factory=list)  # the old version's paces
    questions: dict[str, Question] = field(default_factory=lambda: {name: Question() for name in QUESTIONS})
    waiting: list[int] = field(
        default_factory=lambda: [0] * 4
    )  # ratings of a block that lacks one side: as Question.add

    def add(self, old: Sequence[Answer], new: Sequence[Answer], old_bad: Sequence[bool] = (), new_bad: Sequence[bool] = ()) -> None:  # fmt: skip
        """Take a block of answers, and of ratings (True: bad), that came at about the same time.

        Ratings are few: those of one version wait for one of the other, as a block of one side says nothing.
        """
        dice = random.Random(self.seed * 1_000_003 + self.blocks)
        self.blocks += 1
        # The margin of the error rate: with that chance an answer of the old version counts as an error, though it was none.
        failed = sum(it.failed or dice.random() < self.error_margin for it in old)
        self.questions["error"].add(len(old), failed, len(new), sum(it.failed for it in new))
        paces = [[it.pace for it in answers if not it.failed] for answers in (old, new)]
        if len(self.recent) >= FEWEST:
            ordered = sorted(self.recent)
            for name, share in QUANTILES.items():
                limit = ordered[min(int(share * len(ordered)), len(ordered) - 1)]
                yes = sum(p > limit for p in paces[0]), sum(p > limit * (1 + self.latency_margin) for p in paces[1])
                self.questions[name].add(len(paces[0]), yes[0], len(paces[1]), yes[1])
        self.recent = [*self.recent, *paces[0]][-RECENT:]
        rated = len(old_bad), sum(old_bad), len(new_bad), sum(new_bad)
        self.waiting = [waiting + more for waiting, more in zip(self.waiting, rated, strict=True)]
        if self.waiting[0] and self.waiting[2]:
            self.questions["rated bad"].add(*self.waiting)
            self.waiting = [0] * 4


@dataclass(frozen=True)
class Rules:
    """How a new version comes to all of the traffic, or to none."""

    stages: tuple[float, ...]  # shares of the traffic, the last one is 1
    requests: int  # that the new version answers at each stage, at least
    seconds: float  # at each stage, at least
    false_alarm: float  # chance that a version as good as the old one is ever withdrawn, at most


@dataclass(frozen=True)
class Decision:
    """What to do with a new version, and why."""

    act: str  # withdraw, advance or hold
    reason: str = ""


def decide(evidence: Evidence, rules: Rules, stage_answers: int, stage_s: float) -> Decision:
    """Judge a new version at a stage in which it has answered `stage_answers` requests within `stage_s` seconds."""
    for name, question in evidence.questions.items():
        if question.evidence >= len(QUESTIONS) / rules.false_alarm:
            return Decision("withdraw", in_words(name, question))
    if stage_answers >= rules.requests and stage_s >= rules.seconds:
        return Decision("advance", f"{stage_answers} more answers, none of the tests says that it is worse")
    return Decision("hold")


def in_words(name: str, question: Question) -> str:
    """Say what the evidence is."""
    what = {"error": "errors", "slow": "answers slower than the old version's median and margin",
            "very slow": "answers slower than the old version's 95th percentile and margin", "rated bad": "bad ratings"}[name]  # fmt: skip
    return (
        f"{what}: {question.new_yes} of {question.new:,} by the new version, {question.old_yes} of {question.old:,} by the old one "
        f"(evidence {min(question.evidence, 1e9):.3g})"
    )

"""Which version of a model answers whom: the state of an endpoint's changes, and the rules by which it goes on.

A model (a name that clients ask for) has one version that answers, at most one new one that is tried, and those before it,
whose replicas are kept for a while so that the way back takes no time. All here is plain data and pure rules; the steward
keeps it and acts on it, the routers in the ingress go by a copy.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.serve.routing.sequential_test import Answer, Decision, Evidence, Question, Rules, decide

KEPT = 5  # versions before the present one that can be gone back to
TOLD = 20  # events that are remembered


@dataclass(frozen=True)
class Version:
    """A bundle with the options that it is served with. Another bundle or another option is another version."""

    id: str
    app: str  # the Serve application that holds its replicas
    hash: str  # the bundle's
    folder: str
    options: dict[str, Any]  # ServeConfig
    about: dict[str, Any] = field(default_factory=dict)  # what a replica says of itself; empty until one was asked


@dataclass(frozen=True)
class Plan:
    """How a new version is brought in."""

    strategy: str
    rules: Rules
    error_margin: float
    latency_margin: float
    shadow_share: float  # of the traffic that is copied
    shadow_requests: int  # comparisons after which the shadow ends
    keep_warm_s: float  # seconds that the replicas of the version before are kept


@dataclass
class ShadowStats:
    """What a shadow's answers were beside those that clients got."""

    copied: int = 0
    failed: int = 0  # of the shadow
    alike: int = 0
    compared: int = 0  # could be: classifications, embeddings, greedy or seeded texts
    distances: list[float] = field(default_factory=list)  # largest difference of a score or log-probability, per answer
    paces: list[tuple[float, float]] = field(default_factory=list)  # (old, new) in seconds a token or text

    def in_words(self) -> str:
        """Say how the two compare."""
        told = [f"{self.copied} requests copied, {self.failed} failed"]
        if self.compared:
            told.append(f"{self.alike} of {self.compared} answers alike ({self.alike / self.compared:.1%})")
        if self.distances:
            told.append(f"scores differ by {statistics.median(self.distances):.2g} (median), {max(self.distances):.2g} (most)")  # fmt: skip
        if self.paces:
            old, new = (statistics.median(each) for each in zip(*self.paces, strict=True))
            told.append(f"{new / old:.2f} times the time" if old else f"{1000 * new:.1f} ms")
        return ", ".join(told)


@dataclass
class Trial:
    """A new version that is tried."""

    version: Version
    plan: Plan
    began: float  # of this stage, in seconds since 1970
    stage: int = 0
    answers: int = 0  # of this stage
    evidence: Evidence = field(default_factory=lambda: Evidence(0.01, 0.2))
    agreement: ShadowStats = field(default_factory=ShadowStats)

    @property
    def share(self) -> float:
        """The share of the traffic that it answers."""
        return self.plan.rules.stages[self.stage] if self.plan.strategy == "canary" else 0.0

    @property
    def copied(self) -> float:
        """The share of the traffic that is copied to it."""
        return self.plan.shadow_share if self.plan.strategy == "shadow" else 0.0


@dataclass
class Model:
    """One name that clients ask for."""

    name: str
    stable: Version
    trial: Trial | None = None
    before: list[Version] = field(default_factory=list)  # the last one first
    warm: dict[str, float] = field(default_factory=dict)  # app -> when its replicas are let go, seconds since 1970
    events: list[dict[str, Any]] = field(default_factory=list)
    told: int = 0  # events so far
    recent: list[float] = field(default_factory=list)  # paces of the version that answers

    def tell(self, now: float, event: str, version: Version, reason: str = "") -> dict[str, Any]:
        """Note what happened; return it."""
        told = {"time": now, "model": self.name, "event": event, "version": version.id, "bundle": version.hash, "reason": reason}  # fmt: skip
        self.events, self.told = [*self.events, told][-TOLD:], self.told + 1
        return told

    def since(self, told: int) -> list[dict[str, Any]]:
        """Return the events after the first `told`, as far as they are remembered."""
        new = self.told - told
        return self.events[-new:] if new else []

    def begin(self, version: Version, plan: Plan, now: float) -> None:
        """Bring a version in that is ready to answer."""
        self.warm.pop(version.app, None)
        if self.trial and self.trial.version.id != version.id:
            self.withdraw(now, "another version was deployed")
        if version.id == self.stable.id:
            self.stable = version
            self.tell(now, "unchanged", version, "it answers already")
        elif plan.strategy == "replace":
            self.promote(version, plan.keep_warm_s, now, "deployed at once")
        else:
            evidence = Evidence(plan.error_margin, plan.latency_margin, recent=list(self.recent))
            self.trial = Trial(version, plan, now, evidence=evidence)
            share = f"{self.trial.share:.0%} of the traffic" if plan.strategy == "canary" else f"{plan.shadow_share:.0%} of the traffic, copied"  # fmt: skip
            self.tell(now, plan.strategy, version, share)

    def promote(self, version: Version, keep_warm_s: float, now: float, reason: str) -> None:
        """Let a version answer everybody."""
        old = self.stable
        self.before = [old, *(it for it in self.before if it.id not in (old.id, version.id))][:KEPT]
        self.warm[old.app] = now + keep_warm_s
        self.warm.pop(version.app, None)
        self.stable, self.trial, self.recent = version, None, []
        self.tell(now, "promoted", version, reason)

    def withdraw(self, now: float, reason: str) -> None:
        """Take the version that is tried off."""
        assert self.trial
        self.warm[self.trial.version.app] = now + self.trial.plan.keep_warm_s
        self.tell(now, "withdrawn", self.trial.version, reason)
        self.trial = None

    def judge(self, old: Sequence[Answer], new: Sequence[Answer], old_bad: Sequence[bool], new_bad: Sequence[bool], now: float) -> Decision | None:  # fmt: skip
        """Take what came in since the last time, and go on with what is tried as the evidence says."""
        trial = self.trial
        if trial is None:
            self.recent = [*self.recent, *(it.pace for it in old if not it.failed)][-500:]
            return None
        if trial.plan.strategy == "shadow":
            if trial.agreement.copied >= trial.plan.shadow_requests:
                self.tell(now, "compared", trial.version, trial.agreement.in_words())
                self.withdraw(now, "the comparison is done")
            return None
        trial.evidence.add(old, new, old_bad, new_bad)
        trial.answers += len(new)
        decision = decide(trial.evidence, trial.plan.rules, trial.answers, now - trial.began)
        if decision.act == "withdraw":
            self.withdraw(now, decision.reason)
        elif decision.act == "advance":
            if trial.stage + 1 >= len(trial.plan.rules.stages) or trial.plan.rules.stages[trial.stage + 1] >= 1:
                self.promote(trial.version, trial.plan.keep_warm_s, now, decision.reason)
            else:
                trial.stage, trial.began, trial.answers = trial.stage + 1, now, 0
                self.tell(now, "canary", trial.version, f"{trial.share:.0%} of the traffic: {decision.reason}")
        return decision

    def keep(self, apps: Sequence[str], until: float) -> None:
        """Keep the replicas of applications until then at least, of those that are let go one day."""
        self.warm = {app: max(moment, until) if app in apps else moment for app, moment in self.warm.items()}

    def expired(self, now: float) -> list[str]:
        """Return, and forget, the applications whose replicas are kept no longer."""
        gone = [app for app, until in self.warm.items() if until <= now]
        for app in gone:
            del self.warm[app]
        return gone

    def table(self) -> dict[str, Any]:
        """Return what a router needs to know."""
        trial = self.trial and {"version": asdict(self.trial.version), "share": self.trial.share, "copied": self.trial.copied}  # fmt: skip
        return {"stable": asdict(self.stable), "trial": trial, "events": self.events}


def chosen(table: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the version that answers whoever has this key: always the same one, also as the new one's share grows."""
    trial = table["trial"]
    version: dict[str, Any] = trial["version"] if trial and position(trial["version"]["id"], key) < trial["share"] else table["stable"]  # fmt: skip
    return version


def position(salt: str, key: str) -> float:
    """Return a place in [0, 1) that looks random and is always the same for a key. `salt`: each trial draws other keys."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:8], "big") / 2**64


def to_plain(models: dict[str, Model]) -> dict[str, Any]:
    """Return the whole state as what JSON can hold."""
    return {name: asdict(model) for name, model in models.items()}


def from_plain(state: dict[str, Any]) -> dict[str, Model]:
    """Read it back."""
    return {name: _model(it) for name, it in state.items()}


def plan_from(told: dict[str, Any]) -> Plan:
    """Read a plan back."""
    rules = told["rules"]
    return Plan(**told | {"rules": Rules(**rules | {"stages": tuple(rules["stages"])})})


def _model(told: dict[str, Any]) -> Model:
    trial = None
    if it := told["trial"]:
        evidence = it["evidence"]
        questions = {name: Question(**question) for name, question in evidence["questions"].items()}
        trial = Trial(**it | {
            "version": Version(**it["version"]), "plan": plan_from(it["plan"]),
            "evidence": Evidence(**evidence | {"questions": questions}), "agreement": ShadowStats(**it["agreement"]),
        })  # fmt: skip
    before = [Version(**version) for version in told["before"]]
    return Model(**told | {"stable": Version(**told["stable"]), "trial": trial, "before": before})


def likeness(old: Any, new: Any) -> tuple[bool, float]:
    """Compare two answers: whether all their words are the same, and the largest difference of their numbers."""
    words, numbers = [], []
    for it in (old, new):
        found_words: list[Any] = []
        found_numbers: list[float] = []
        _leaves(it, found_words, found_numbers)
        words.append(found_words)
        numbers.append(found_numbers)
    same = words[0] == words[1]
    if len(numbers[0]) != len(numbers[1]):
        return same, math.nan
    return same, max((abs(a - b) for a, b in zip(*numbers, strict=True)), default=0.0)


def _leaves(it: Any, words: list[Any], numbers: list[float]) -> None:
    if isinstance(it, dict):
        for key in sorted(it):
            _leaves(it[key], words, numbers)
    elif isinstance(it, list | tuple):
        for part in it:
            _leaves(part, words, numbers)
    elif isinstance(it, float):
        numbers.append(it)
    elif isinstance(it, str):
        words.append(it)

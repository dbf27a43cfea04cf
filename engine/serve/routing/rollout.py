"""Which version of a model answers a request: the state of an endpoint's rollouts, and the rules by which they go on.

A model (a name that clients ask for) has one stable version, at most one candidate that is rolled out, and earlier versions,
whose replicas are kept warm for a while so that a rollback takes no time. All here is plain data and pure rules: the
controller keeps the state and acts on it, the routers in the ingress follow a `ModelRoute` of it.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engine.serve.jobs import model_info_from
from engine.serve.routing.messages import Candidate, ModelRoute, RolloutEvent, ShadowComparison, Version
from engine.serve.routing.sequential_test import CanaryRules, Decision, EProcess, Outcome, SequentialTest, decide

MAX_PREVIOUS = 5  # versions before the stable one that can be rolled back to
MAX_EVENTS = 20  # kept for each model
MAX_LATENCIES = 500  # of the stable version, kept for the next candidate


@dataclass(frozen=True)
class RolloutPlan:
    """How a new version is rolled out."""

    strategy: Literal["replace", "canary", "shadow"]
    rules: CanaryRules
    error_margin: float
    latency_margin: float
    shadow_share: float  # of the requests, which are copied
    shadow_requests: int  # comparisons after which a shadow ends
    keep_warm_s: float  # for which the replicas of the previous version are kept


@dataclass
class ShadowStats:
    """A shadow's answers, compared with those that clients got."""

    num_copied: int = 0
    num_failed: int = 0  # of the shadow
    num_identical: int = 0
    num_compared: int = 0  # of deterministic requests: classifications, embeddings, greedy or seeded texts
    max_differences: list[float] = field(default_factory=list)  # of a score or log-probability, by answer
    latencies_s: list[tuple[float, float]] = field(default_factory=list)  # (stable, shadow), as Outcome.latency_s

    def add(self, comparison: ShadowComparison) -> None:
        """Count one copied request."""
        self.num_copied += 1
        self.num_failed += comparison.failed
        if comparison.identical is not None:
            self.num_compared += 1
            self.num_identical += comparison.identical
        if comparison.max_difference is not None:
            self.max_differences.append(comparison.max_difference)
        if not comparison.failed:
            self.latencies_s.append((comparison.stable_latency_s, comparison.shadow_latency_s))

    def summary(self) -> str:
        """Return the comparison as a sentence."""
        parts = [f"{self.num_copied} requests copied, {self.num_failed} failed"]
        if self.num_compared:
            share = self.num_identical / self.num_compared
            parts.append(f"{self.num_identical} of {self.num_compared} answers identical ({share:.1%})")
        if self.max_differences:
            median, largest = statistics.median(self.max_differences), max(self.max_differences)
            parts.append(f"scores differ by {median:.2g} (median), {largest:.2g} (maximum)")
        if self.latencies_s:
            stable_s, shadow_s = (statistics.median(side) for side in zip(*self.latencies_s, strict=True))
            parts.append(f"{shadow_s / stable_s:.2f} times the latency" if stable_s else f"{1000 * shadow_s:.1f} ms")
        return ", ".join(parts)


@dataclass
class Rollout:
    """A candidate version on its way to all of the traffic."""

    version: Version
    plan: RolloutPlan
    stage_started_at: float  # seconds since 1970
    stage: int = 0
    stage_requests: int = 0  # answered by the candidate
    test: SequentialTest = field(default_factory=lambda: SequentialTest(0.01, 0.2))
    shadow_stats: ShadowStats = field(default_factory=ShadowStats)

    @property
    def traffic_share(self) -> float:
        """The share of the requests that the candidate answers."""
        return self.plan.rules.stages[self.stage] if self.plan.strategy == "canary" else 0.0

    @property
    def shadow_share(self) -> float:
        """The share of the requests that are copied to the candidate."""
        return self.plan.shadow_share if self.plan.strategy == "shadow" else 0.0


@dataclass
class ServedModel:
    """One name that clients ask for, and its versions."""

    name: str
    stable: Version
    rollout: Rollout | None = None
    previous: list[Version] = field(default_factory=list)  # latest first
    warm_until: dict[str, float] = field(
        default_factory=dict
    )  # app -> when its replicas are stopped, seconds since 1970
    events: list[RolloutEvent] = field(default_factory=list)  # the latest ones
    num_events: int = 0  # ever
    latencies_s: list[float] = field(default_factory=list)  # of the stable version, the latest ones

    def log_event(self, now: float, event: str, version: Version, reason: str = "") -> RolloutEvent:
        """Append an event, and return it."""
        logged = RolloutEvent(now, self.name, event, version.id, version.hash, reason)
        self.events, self.num_events = [*self.events, logged][-MAX_EVENTS:], self.num_events + 1
        return logged

    def events_after(self, num_events: int) -> list[RolloutEvent]:
        """Return the events after the first `num_events`, as far as they are kept."""
        return latest_events(self.events, self.num_events - num_events)

    def deploy(self, version: Version, plan: RolloutPlan, now: float) -> None:
        """Roll out a version whose replicas are ready."""
        self.warm_until.pop(version.app, None)
        if self.rollout and self.rollout.version.id != version.id:
            self.withdraw(now, "another version was deployed")
        if version.id == self.stable.id:
            self.stable = version
            self.log_event(now, "unchanged", version, "it is the stable version already")
        elif plan.strategy == "replace":
            self.promote(version, plan.keep_warm_s, now, "deployed at once")
        else:
            test = SequentialTest(plan.error_margin, plan.latency_margin, stable_latencies_s=list(self.latencies_s))
            self.rollout = Rollout(version, plan, now, test=test)
            share = f"{self.rollout.traffic_share:.0%} of the traffic" if plan.strategy == "canary" else f"{plan.shadow_share:.0%} of the traffic, copied"  # fmt: skip
            self.log_event(now, plan.strategy, version, share)

    def promote(self, version: Version, keep_warm_s: float, now: float, reason: str) -> None:
        """Make a version the stable one."""
        old = self.stable
        earlier = [previous for previous in self.previous if previous.id not in (old.id, version.id)]
        self.previous = [old, *earlier][:MAX_PREVIOUS]
        self.warm_until[old.app] = now + keep_warm_s
        self.warm_until.pop(version.app, None)
        self.stable, self.rollout, self.latencies_s = version, None, []
        self.log_event(now, "promoted", version, reason)

    def withdraw(self, now: float, reason: str) -> None:
        """End the rollout; the stable version answers all requests again."""
        assert self.rollout
        self.warm_until[self.rollout.version.app] = now + self.rollout.plan.keep_warm_s
        self.log_event(now, "withdrawn", self.rollout.version, reason)
        self.rollout = None

    def update(
        self,
        stable: Sequence[Outcome],
        new: Sequence[Outcome],
        stable_bad: Sequence[bool],
        new_bad: Sequence[bool],
        now: float,
    ) -> Decision | None:
        """Advance or withdraw the candidate by the outcomes and ratings (True: bad) since the last update."""
        rollout = self.rollout
        if rollout is None:
            succeeded_s = (outcome.latency_s for outcome in stable if not outcome.failed)
            self.latencies_s = [*self.latencies_s, *succeeded_s][-MAX_LATENCIES:]
            return None
        plan = rollout.plan
        if plan.strategy == "shadow":
            if rollout.shadow_stats.num_copied >= plan.shadow_requests:
                self.log_event(now, "compared", rollout.version, rollout.shadow_stats.summary())
                self.withdraw(now, "the comparison is done")
            return None
        rollout.test.add_block(stable, new, stable_bad, new_bad)
        rollout.stage_requests += len(new)
        decision = decide(rollout.test, plan.rules, rollout.stage_requests, now - rollout.stage_started_at)
        if decision.action == "withdraw":
            self.withdraw(now, decision.reason)
        elif decision.action == "advance":
            next_stage = rollout.stage + 1
            if next_stage >= len(plan.rules.stages) or plan.rules.stages[next_stage] >= 1:
                self.promote(rollout.version, plan.keep_warm_s, now, decision.reason)
            else:
                rollout.stage, rollout.stage_started_at, rollout.stage_requests = next_stage, now, 0
                self.log_event(now, "canary", rollout.version, f"{rollout.traffic_share:.0%} of the traffic: {decision.reason}")  # fmt: skip
        return decision

    def keep_warm(self, apps: Sequence[str], until: float) -> None:
        """Keep the replicas of these applications until then at least, where they are to be stopped."""
        self.warm_until = {app: max(stop_at, until) if app in apps else stop_at for app, stop_at in self.warm_until.items()}  # fmt: skip

    def pop_expired(self, now: float) -> list[str]:
        """Remove and return the applications whose replicas are to be stopped by now."""
        expired = [app for app, stop_at in self.warm_until.items() if stop_at <= now]
        for app in expired:
            del self.warm_until[app]
        return expired

    def route(self) -> ModelRoute:
        """Return what routers need to know."""
        rollout = self.rollout
        candidate = Candidate(rollout.version, rollout.traffic_share, rollout.shadow_share) if rollout else None
        return ModelRoute(self.stable, candidate, self.events)


def latest_events(events: Sequence[RolloutEvent], count: int) -> list[RolloutEvent]:
    """Return the last `count` events, or all where fewer are kept."""
    return list(events[-count:]) if count else []


def choose_version(route: ModelRoute, key: str) -> Version:
    """Return the version that answers the requests of a key: always the same one, also while the candidate's share grows."""
    candidate = route.candidate
    if candidate and hash_fraction(candidate.version.id, key) < candidate.traffic_share:
        return candidate.version
    return route.stable


def hash_fraction(salt: str, key: str) -> float:
    """Return a uniform number in [0, 1) that depends only on the key and the salt, so that each rollout draws other keys."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:8], "big") / 2**64


def compare_answers(stable: Any, new: Any) -> tuple[bool, float]:
    """Compare nested lists and dicts: whether all texts are equal, and the largest difference of the floats.

    The difference is NaN where the two have not equally many floats.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    floats: tuple[list[float], list[float]] = ([], [])
    for side, answer in enumerate((stable, new)):
        _collect_leaves(answer, texts[side], floats[side])
    identical = texts[0] == texts[1]
    if len(floats[0]) != len(floats[1]):
        return identical, math.nan
    return identical, max((abs(a - b) for a, b in zip(*floats, strict=True)), default=0.0)


def _collect_leaves(value: Any, texts: list[str], floats: list[float]) -> None:
    if isinstance(value, dict):
        for key in sorted(value):
            _collect_leaves(value[key], texts, floats)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect_leaves(item, texts, floats)
    elif isinstance(value, float):
        floats.append(value)
    elif isinstance(value, str):
        texts.append(value)


def to_json(models: dict[str, ServedModel]) -> dict[str, Any]:
    """Return the state of all models as JSON can hold it."""
    return {name: asdict(model) for name, model in models.items()}


def from_json(state: dict[str, Any]) -> dict[str, ServedModel]:
    """Return the state of all models from `to_json`."""
    return {name: _model_from(fields) for name, fields in state.items()}


def version_from(fields: dict[str, Any]) -> Version:
    """Return a version from `dataclasses.asdict`."""
    return Version(**fields | {"info": model_info_from(fields["info"]) if fields["info"] else None})


def _plan_from(fields: dict[str, Any]) -> RolloutPlan:
    rules = fields["rules"]
    return RolloutPlan(**fields | {"rules": CanaryRules(**rules | {"stages": tuple(rules["stages"])})})


def _model_from(fields: dict[str, Any]) -> ServedModel:
    return ServedModel(**fields | {
        "stable": version_from(fields["stable"]),
        "rollout": _rollout_from(fields["rollout"]) if fields["rollout"] else None,
        "previous": [version_from(version) for version in fields["previous"]],
        "events": [RolloutEvent(**event) for event in fields["events"]],
    })  # fmt: skip


def _rollout_from(fields: dict[str, Any]) -> Rollout:
    e_processes = {name: EProcess(**e_process) for name, e_process in fields["test"]["e_processes"].items()}
    return Rollout(**fields | {
        "version": version_from(fields["version"]), "plan": _plan_from(fields["plan"]),
        "test": SequentialTest(**fields["test"] | {"e_processes": e_processes}),
        "shadow_stats": ShadowStats(**fields["shadow_stats"]),
    })  # fmt: skip

"""Routing without a server: which version answers, what is retried where, and what is reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from engine.serve.jobs import (
    Choice,
    ClassificationJob,
    Failure,
    GenerationJob,
    GenerationResult,
    ModelInfo,
    PromptInfo,
    SamplingParams,
    StreamChunk,
)
from engine.serve.routing.messages import Candidate, ModelRoute, Report, RoutingTable, ShadowComparison, Version
from engine.serve.routing.rollout import hash_fraction
from engine.serve.routing.router import Router, VersionWithdrawn
from engine.serve.routing.sequential_test import Outcome

OPTIONS = {"min_replicas": 1, "max_num_seqs": 4}
STABLE = Version("stable", "app-stable", "aaaa", "/stable", OPTIONS)
NEW = Version("new", "app-new", "bbbb", "/new", OPTIONS)
CANARY, SHADOW = Candidate(NEW, 0.5, 0.0), Candidate(NEW, 0.0, 1.0)
SETTINGS = {"options": {"tries": 3, "ingresses": 1}, "access": {}}
JOB = ClassificationJob(["text"])
GENERATION = GenerationJob(prompts=["text"], messages=None, max_tokens=4, sampling=SamplingParams())
PROMPT = PromptInfo(2, 0, [])
BROKEN = Failure("broken", status=500)
REFUSED = Failure("too long", "prompt", status=400)


def result(text: str, num_tokens: int = 4) -> GenerationResult:
    return GenerationResult(PROMPT, [Choice(0, text, num_tokens, "stop")])


class FakeStream:
    def __init__(self, messages: list[Any]) -> None:
        self.messages, self.cancelled = list(messages), False

    async def __anext__(self) -> Any:
        if not self.messages:
            raise StopAsyncIteration
        message = self.messages.pop(0)
        if isinstance(message, BaseException):
            raise message
        return message

    def cancel(self) -> None:
        self.cancelled = True


class FakeReplicas:
    """Answers with what is queued for each version; an exception is raised, an event is awaited first."""

    def __init__(self, **queued: list[Any]) -> None:
        self.queued, self.calls = queued, list[tuple[str, str]]()
        self.max_tries, self.num_ingresses, self.apps = 3, 1, set[str]()
        self.streams: list[FakeStream] = []

    async def add_apps(self, apps: Any) -> None:
        self.apps |= set(apps)

    async def call(self, version: Version, method: str, job: Any, trace: Any) -> Any:
        self.calls.append((version.id, method))
        answer = self.queued[version.id].pop(0)
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            return await self.call(version, method, job, trace)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stream(self, version: Version, job: Any, trace: Any) -> FakeStream:
        self.calls.append((version.id, "stream"))
        self.streams.append(FakeStream(self.queued[version.id].pop(0)))
        return self.streams[-1]

    async def describe(self, version: Version) -> ModelInfo:
        self.calls.append((version.id, "describe"))
        return ModelInfo("completion", version.hash, 128, 512, True)


def route(candidate: Candidate | None) -> RoutingTable:
    return RoutingTable(1, {"m": ModelRoute(STABLE, candidate, [])}, {})


def run(work: Callable[[Router, FakeReplicas], Coroutine[Any, Any, None]], candidate: Candidate | None, **queued: list[Any]) -> Report:  # fmt: skip
    """Run something with a router, and return what the router has to report."""

    async def main() -> Report:
        replicas: Any = FakeReplicas(**queued)
        router = Router(None, SETTINGS, lambda settings: None, replicas)
        await router.adopt(route(candidate))
        async with asyncio.timeout(20):
            await work(router, replicas)
        return router.reporter.take()

    return asyncio.run(main())


def key_of(version: str) -> str:
    """Return a key that the canary's share assigns to a version."""
    keys = (f"user {i}" for i in range(100))
    return next(key for key in keys if (hash_fraction("new", key) < 0.5) == (version == "new"))


def reported_failures(report: Report) -> dict[str, list[bool]]:
    """Return whether each outcome that is reported is a failure, by version."""
    return {version: [outcome.failed for outcome in outcomes] for version, outcomes in report.outcomes.items()}


def test_key_decides_on_the_version() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        for version in ("stable", "new"):
            router.begin_request(key_of(version))
            assert (await router.call("m", "complete", GENERATION)).choices[0].text == version
            assert router.version("m").id == version
        assert replicas.apps == {"app-stable", "app-new"}

    report = run(work, CANARY, stable=[result("stable")], new=[result("new")])
    assert reported_failures(report) == {"stable": [False], "new": [False]}


def test_latency_is_by_token() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        release = asyncio.Event()
        replicas.queued["stable"] = [release, result("a", num_tokens=1000)]
        call = asyncio.ensure_future(router.call("m", "complete", GENERATION))
        await asyncio.sleep(0.05)
        release.set()
        await call

    (outcome,) = run(work, None).outcomes["stable"]
    assert 0.05 / 1000 <= outcome.latency_s < 0.05


@pytest.mark.parametrize("failure", [BROKEN, RayActorError(), RuntimeError("bug")])
def test_failing_canary_is_covered_for_by_the_stable_version(failure: Any) -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        router.begin_request(key_of("new"))
        assert (await router.call("m", "complete", GENERATION)).choices[0].text == "stable"
        assert router.version("m").id == "stable"
        assert [version for version, _ in replicas.calls] == ["new", "stable"]

    report = run(work, CANARY, new=[failure], stable=[result("stable")])
    assert reported_failures(report) == {"new": [True]}


def test_full_queue_is_no_failure_of_the_canary() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        router.begin_request(key_of("new"))
        assert (await router.call("m", "complete", GENERATION)).choices[0].text == "stable"

    assert run(work, CANARY, new=[BackPressureError(4, 4)], stable=[result("stable")]) == Report()


def test_failures_of_the_stable_version_reach_the_client() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        assert await router.call("m", "complete", GENERATION) == BROKEN
        assert await router.call("m", "complete", GENERATION) == REFUSED
        with pytest.raises(RayActorError):
            await router.call("m", "complete", GENERATION)

    report = run(work, CANARY, stable=[BROKEN, REFUSED, RayActorError()])
    assert reported_failures(report) == {"stable": [True, False, True]}


def test_requests_of_a_withdrawn_version_go_to_the_stable_one() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        router.begin_request(key_of("new"))
        call = asyncio.ensure_future(router.call("m", "complete", GENERATION))
        await asyncio.sleep(0.01)
        await router.adopt(route(None))
        assert (await call).choices[0].text == "stable"
        waiting = asyncio.ensure_future(router.unless_withdrawn("m", NEW, asyncio.Event().wait()))
        await asyncio.sleep(0.01)
        await router.adopt(route(None))
        with pytest.raises(VersionWithdrawn):
            await waiting

    run(work, CANARY, new=[asyncio.Event()], stable=[result("stable")])


def test_shadow_gets_copies_and_its_answers_are_compared() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        for _ in range(4):
            assert (await router.call("m", "complete", GENERATION)).choices[0].text == "a"
            while router._shadow_requests:
                await asyncio.sleep(0.001)

    shadow = [result("a"), result("b"), BROKEN, RayActorError()]
    report = run(work, SHADOW, stable=[result("a") for _ in range(4)], new=shadow)
    comparisons = report.comparisons["new"]
    assert [comparison.failed for comparison in comparisons] == [False, False, True, True]
    assert [comparison.identical for comparison in comparisons] == [True, False, None, None]
    assert [comparison.max_difference for comparison in comparisons] == [0.0, 0.0, None, None]
    assert reported_failures(report) == {"stable": [False] * 4}


def test_sampled_text_is_not_compared() -> None:
    sampled = GenerationJob(prompts=["text"], messages=None, max_tokens=4, sampling=SamplingParams(temperature=1.0))

    async def work(router: Router, replicas: FakeReplicas) -> None:
        await router.call("m", "complete", sampled)
        while router._shadow_requests:
            await asyncio.sleep(0.001)

    (comparison,) = run(work, SHADOW, stable=[result("a")], new=[result("b")]).comparisons["new"]
    assert (comparison.failed, comparison.identical) == (False, None)


async def read(router: Router) -> tuple[list[Any], str]:
    messages = [message async for message in router.stream("m", GENERATION)]
    texts = [choice.text for message in messages if isinstance(message, StreamChunk) for choice in message.choices]
    return messages, "".join(texts)


def chunk(text: str, num_tokens: int) -> StreamChunk:
    return StreamChunk([Choice(0, text, num_tokens)])


@pytest.mark.parametrize("failure", [BROKEN, RuntimeError("bug")])
def test_stream_restarts_on_the_stable_version_before_any_text(failure: Any) -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        router.begin_request(key_of("new"))
        messages, text = await read(router)
        assert text == "ab"
        assert [type(message) for message in messages] == [PromptInfo, StreamChunk, StreamChunk]

    report = run(work, CANARY, new=[[PROMPT, failure]], stable=[[PROMPT, chunk("a", 1), chunk("b", 2)]])
    assert reported_failures(report) == {"new": [True], "stable": [False]}


def test_lost_replica_is_retried_before_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.serve.routing.router.RETRY_DELAY_S", 0.001)

    async def work(router: Router, replicas: FakeReplicas) -> None:
        assert (await read(router))[1] == "a"
        with pytest.raises(RayActorError):  # all tries
            await read(router)
        with pytest.raises(RayActorError):  # the client has text already
            await read(router)
        assert len(replicas.calls) == 2 + 3 + 1

    lost = RayActorError()
    streams = [[PROMPT, lost], [PROMPT, chunk("a", 1)], [lost], [lost], [PROMPT, lost], [PROMPT, chunk("a", 1), lost]]
    assert reported_failures(run(work, None, stable=streams)) == {"stable": [False, True, True]}


def test_canary_that_fails_amid_a_text_is_reported() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        router.begin_request(key_of("new"))
        messages, _ = await read(router)
        assert messages == [PROMPT, chunk("a", 1), BROKEN]

    assert reported_failures(run(work, CANARY, new=[[PROMPT, chunk("a", 1), BROKEN]])) == {"new": [True]}


def test_finished_stream_is_copied_to_the_shadow() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        await read(router)
        await read(router)
        while router._shadow_requests:
            await asyncio.sleep(0.001)
        assert replicas.calls.count(("new", "complete")) == 2

    stable = [[PROMPT, chunk("a", 1), StreamChunk([Choice(0, "b", 2, "stop")])], [REFUSED]]
    report = run(work, SHADOW, stable=stable, new=[result("ab"), REFUSED])
    assert [comparison.identical for comparison in report.comparisons["new"]] == [True, True]


def test_aborted_stream_is_not_reported() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        stream = router.stream("m", GENERATION)
        assert await anext(stream) == PROMPT
        stream.cancel()
        assert replicas.streams[0].cancelled

    assert run(work, SHADOW, stable=[[PROMPT, chunk("a", 1)]]) == Report()


def test_model_info_is_asked_for_once_where_the_controller_has_none() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        assert router.model_info("m") is None
        await router.fetch_model_info("m")
        info = router.model_info("m")
        assert info
        assert info.hash == "aaaa"
        assert router.status("m") == {
            "version": "stable", "trial": {"version": "new", "hash": "bbbb", "share": 0.5, "copied": 0.0}, "events": [],
        }  # fmt: skip

    run(work, CANARY)


def test_ratings_count_for_the_version_of_the_hash() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        router.record_rating("m", "aaaa", False)
        router.record_rating("m", "bbbb:poet", True)
        router.record_rating("m", "", True)
        router.record_rating("other", "aaaa", True)

    assert run(work, CANARY).ratings == {"stable": [False], "new": [True]}


def test_lost_reports_are_kept_for_the_next_one() -> None:
    async def work(router: Router, replicas: FakeReplicas) -> None:
        reporter = router.reporter
        reporter.add_outcome("stable", Outcome(False, 1.0))
        reporter.add_comparison("new", ShadowComparison())
        report = reporter.take()
        reporter.add_outcome("stable", Outcome(True, 2.0))
        reporter.add_rating("stable", True)
        reporter.put_back(report)

    report = run(work, None)
    assert report.outcomes == {"stable": [Outcome(False, 1.0), Outcome(True, 2.0)]}
    assert report.comparisons == {"new": [ShadowComparison()]}
    assert report.ratings == {"stable": [True]}


def test_new_settings_reach_the_ingress() -> None:
    async def main() -> None:
        adopted: list[dict[str, Any]] = []
        replicas: Any = FakeReplicas()
        router = Router(None, SETTINGS, adopted.append, replicas)
        assert not router.table_received.is_set()
        await router.adopt(RoutingTable(1, {}, {}))
        await router.adopt(RoutingTable(2, {}, SETTINGS))
        changed = {"options": {"tries": 5, "ingresses": 2}, "access": {}}
        await router.adopt(RoutingTable(3, {}, changed))
        assert (router.table_received.is_set(), router.revision, adopted) == (True, 3, [changed])
        assert (replicas.max_tries, replicas.num_ingresses) == (5, 2)

    asyncio.run(main())

"""A replica in this process, without Ray Serve: its jobs, their failures, and what it reports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch

from engine.bundles.bundle import Bundle
from engine.config import Config, ServeConfig
from engine.serve.jobs import (
    ClassificationJob,
    EmbeddingJob,
    EmbeddingResult,
    Failure,
    GenerationJob,
    GenerationResult,
    PromptInfo,
    StreamChunk,
)
from engine.serve.replica import Replica
from engine.serve.routing.autoscaling import IPC_REQUESTS, TOKENS_IN_FLIGHT
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.clients import wait_for

PROMPT = "import os\n"


@pytest.fixture(scope="module")
def bundle(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fresh_bundle(tiny, tmp_path_factory.mktemp("replica") / "writer" / "bundle")


@pytest.fixture(scope="module")
def replica(bundle: Bundle) -> Iterator[Replica]:
    num_threads = torch.get_num_threads()
    yield Replica(str(bundle.folder), asdict(ServeConfig(precision="fp32")))
    torch.set_num_threads(num_threads)


def generation_job(**fields: object) -> GenerationJob:
    return GenerationJob(**{"prompts": [PROMPT], "messages": None, "max_tokens": 12} | fields)  # type: ignore[arg-type]


def test_completion_equals_the_bundles_prediction(replica: Replica, bundle: Bundle) -> None:
    (expected,) = bundle.objective().predict(bundle.model(), [{"prompt": PROMPT, "max_tokens": 12}])
    result = asyncio.run(replica.complete(generation_job(n=2)))
    assert isinstance(result, GenerationResult)
    assert [choice.text for choice in result.choices] == [expected["text"]] * 2
    assert [choice.index for choice in result.choices] == [0, 1]
    assert result.prompt.prompt_tokens == len(bundle.processor()(PROMPT)["input_ids"])
    assert result.num_units == 2 * len(expected["tokens"])


def test_stream_adds_up_to_the_completion(replica: Replica) -> None:
    async def stream() -> list[object]:
        return [message async for message in replica.stream(generation_job(stream=True))]

    first, *chunks = asyncio.run(stream())
    assert isinstance(first, PromptInfo)
    texts = [choice.text for chunk in chunks if isinstance(chunk, StreamChunk) for choice in chunk.choices]
    result = asyncio.run(replica.complete(generation_job()))
    assert isinstance(result, GenerationResult)
    assert "".join(texts) == result.choices[0].text
    assert len(texts) > 1


def test_hang_up_frees_the_slot(replica: Replica) -> None:
    never_ends = generation_job(stream=True, max_tokens=100, json_schema='{"type": "array", "minItems": 200}')

    async def hang_up() -> None:
        messages = replica.stream(never_ends)
        await anext(messages)
        stats = replica.record_autoscaling_stats()
        assert stats[TOKENS_IN_FLIGHT] > 0
        assert stats[IPC_REQUESTS] == 0
        await messages.aclose()  # type: ignore[attr-defined]

    asyncio.run(hang_up())
    wait_for(lambda: replica.load_stats()["running"] == 0)
    assert replica.record_autoscaling_stats()[TOKENS_IN_FLIGHT] == 0


def test_job_that_is_too_long_is_a_failure(replica: Replica) -> None:
    max_positions = replica.describe().max_positions
    failure = asyncio.run(replica.complete(generation_job(max_tokens=max_positions)))
    assert isinstance(failure, Failure)
    assert (failure.param, failure.status) == ("max_tokens", 400)
    failure = asyncio.run(replica.embed(EmbeddingJob([[7] * (max_positions + 1)])))
    assert isinstance(failure, Failure)
    assert (failure.param, failure.status) == ("input", 400)


def test_embeddings_have_length_one(replica: Replica) -> None:
    result = asyncio.run(replica.embed(EmbeddingJob([PROMPT, [7, 8, 9]])))
    assert isinstance(result, EmbeddingResult)
    assert [sum(value**2 for value in vector) for vector in result.vectors] == pytest.approx([1.0, 1.0])
    assert result.prompt_tokens > 3
    assert replica.load_stats()["rows"] >= 2


def test_model_info_names_task_and_sizes(replica: Replica, bundle: Bundle) -> None:
    info = replica.describe()
    assert (info.task, info.hash, info.can_embed, info.image) == ("completion", bundle.hash, True, None)
    assert info.vocab_size == len(bundle.processor())
    replica.check_health()


def test_classifications_have_scores_of_all_labels(tiny_functions: Config, tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    classifier = fresh_bundle(tiny_functions, tmp_path_factory.mktemp("classifier") / "namer" / "bundle")
    num_threads = torch.get_num_threads()
    try:
        replica = Replica(str(classifier.folder), asdict(ServeConfig(precision="fp32")))
        result = asyncio.run(replica.classify(ClassificationJob(["return self.x", "i += 1"])))
    finally:
        torch.set_num_threads(num_threads)
    for item in result.items:
        assert item.label == max(item.scores, key=lambda label: item.scores[label])
        assert sum(item.scores.values()) == pytest.approx(1.0)
        assert item.num_tokens > 0
    assert replica.record_autoscaling_stats()[TOKENS_IN_FLIGHT] == 0

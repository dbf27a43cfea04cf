"""Speculative decoding by a draft model changes the number of forwards, and no token, random number or log-probability."""

from __future__ import annotations

import asyncio
import copy
import functools
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from torch import nn

from engine.bundles.bundle import Bundle
from engine.config import Config, ServeConfig, with_values
from engine.errors import UserError
from engine.serve.application import make_version
from engine.serve.deploy import deploy, resolve_draft_model
from engine.serve.http.schemas import CompletionRequest
from engine.serve.jobs import GenerationResult, SamplingParams
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.speculative import DraftModel
from engine.serve.load_model import load_model
from engine.serve.preflight import check_servable
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.engine_harness import CONFIGS, EOS, EngineHarness, model, requests, tokens_of
from tests.engine.serve.llm.test_speculative import assert_same_output
from tests.ports import free_port

DRAFTS = {"llama": "gpt2", "gpt2": "llama", "qwen2": "qwen2"}  # of another family, with one exception


@functools.cache
def similar(family: str) -> nn.Module:
    """Return a model whose outputs are mostly those of the family's model."""
    near = copy.deepcopy(model(family))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in near.parameters():
            if p.ndim > 1:
                p += 0.02 * p.std() * torch.randn(p.shape, generator=rng)
    return near


def speculative_harness(draft_model: nn.Module, num_speculative_tokens: int = 4, **options: Any) -> EngineHarness:
    """Return an engine for the Llama model with a copy of a draft model."""
    return EngineHarness(
        "llama", num_speculative_tokens=num_speculative_tokens, draft_model=copy.deepcopy(draft_model), **options
    )


def record_batches(harness: EngineHarness) -> list[list[Any]]:
    """Return a list to which each batch of the draft model will be appended."""
    batches: list[list[Any]] = []
    proposer: Any = harness.engine.proposer
    run = proposer.runner.run

    def run_and_record(batch: list[Any]) -> Any:
        batches.append(batch)
        return run(batch)

    proposer.runner.run = run_and_record
    return batches


@pytest.mark.parametrize("family", DRAFTS)
def test_greedy_tokens_equal_generate_with_any_draft_model(family: str, caplog: pytest.LogCaptureFixture) -> None:
    cases = requests(family)
    expected = [case.expected for case in cases]
    plain = EngineHarness(family)
    plain.generate([case.sequence() for case in cases])
    for draft in (model(family), similar(family), model(DRAFTS[family])):
        harness = EngineHarness(family, num_speculative_tokens=4, draft_model=copy.deepcopy(draft))
        assert tokens_of(harness.generate([case.sequence() for case in cases])) == expected
        joining = [case.sequence() for case in cases]
        for sequence in joining:  # between forwards, in slots that others have freed
            harness.engine.submit([sequence])
        assert tokens_of(harness.wait(joining)) == expected
        accepted, proposed = harness.engine.num_accepted_tokens, harness.engine.num_draft_tokens
        if draft is model(family):  # all its tokens are accepted, but for the end token, which is never in a text
            assert accepted > 0.9 * proposed
            assert harness.engine.stats["steps"] < 2 * plain.engine.stats["steps"] * 0.6
        elif draft is similar(family):
            assert 0.3 * proposed < accepted < proposed
        assert harness.engine.stats["draft_forwards"] > 0
    assert not caplog.records, "a draft model that pauses after rejections has not failed"


def test_draft_model_changes_no_sample_and_no_logprob() -> None:
    samplings = [
        SamplingParams(), SamplingParams(0.5), SamplingParams(1.0, top_p=0.9), SamplingParams(1.0, top_k=5),
        SamplingParams(0.7, frequency_penalty=0.5), SamplingParams(logit_bias={7: 5.0}), SamplingParams(1.0),
    ]  # fmt: skip
    prompt, batches = requests("llama")[1].prompt, []
    for draft in (None, model("llama"), similar("llama"), model("gpt2")):
        harness = EngineHarness("llama", num_speculative_tokens=4 if draft else 0, draft_model=copy.deepcopy(draft))
        sequences = [Sequence(prompt, 40, sampling, seed=i, num_logprobs=2) for i, sampling in enumerate(samplings)]
        batches.append(harness.generate(sequences))
        if draft is similar("llama"):  # both sample with the same random numbers
            assert harness.engine.num_accepted_tokens > 0.5 * harness.engine.num_draft_tokens
    for batch in batches[1:]:
        for sequence, expected in zip(batch, batches[0], strict=True):
            assert_same_output(sequence, expected)


def test_samples_follow_the_models_distribution() -> None:
    """Counts of a first and a second token over many seeds, beside the model's own probabilities (chi-squared)."""
    harness = speculative_harness(similar("llama"), 2, max_num_seqs=16, max_queue=5000)
    prompt, num_seeds, sampling = [7, 9, 11], 2000, SamplingParams(1.0, top_k=4, logit_bias={EOS: -100.0})
    sequences = harness.generate([Sequence(prompt, 3, sampling, seed=seed) for seed in range(num_seeds)])
    assert harness.engine.num_draft_tokens > num_seeds / 4
    with torch.no_grad():
        for first in {tuple(sequence.tokens[:1]) for sequence in sequences}:
            rows = [sequence.tokens for sequence in sequences if tuple(sequence.tokens[:1]) == first]
            logits = model("llama")(torch.tensor([prompt + list(first)])).logits[0, -1]
            logits[EOS] -= 100
            top = logits.topk(4)
            probabilities = top.values.double().softmax(0).tolist()
            counts = [sum(row[1] == token for row in rows) for token in top.indices.tolist()]
            assert sum(counts) == len(rows)
            means = [probability * len(rows) for probability in probabilities]
            likely = [(count, mean) for count, mean in zip(counts, means, strict=True) if mean > 5]
            assert sum((count - mean) ** 2 / mean for count, mean in likely) < 21.1  # 3 degrees: one in ten thousand


def test_draft_models_cache_has_the_same_shape() -> None:
    cases = requests("llama")
    harness = speculative_harness(similar("llama"), kv_cache_tokens=128)
    assert tokens_of(harness.generate([case.sequence() for case in cases])) == [case.expected for case in cases]
    proposer: Any = harness.engine.proposer
    shape = harness.engine.kv_cache.shape
    assert shape.num_slots * shape.capacity <= 128
    assert (proposer.runner.num_slots, proposer.runner.capacity) == (shape.num_slots, shape.capacity)
    assert proposer.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes


def test_draft_model_does_not_compute_a_cached_prefix_again() -> None:
    harness = speculative_harness(model("llama"), 3, max_batched_tokens=256)
    batches = record_batches(harness)

    def most_computed() -> int:
        return max(len(inputs.tokens) for batch in batches for inputs in batch)

    system = [number % 290 + 6 for number in range(0, 600, 11)]
    (first,) = harness.generate([Sequence([*system, 7, 8], 12)])
    assert most_computed() == len(system) + 3
    batches.clear()
    (again,) = harness.generate([Sequence([*system, 7, 8], 12)])
    assert again.tokens == first.tokens
    assert most_computed() <= 2
    batches.clear()
    harness.generate([Sequence([*system, 9], 8) for _ in range(3)])
    assert most_computed() <= 3
    assert harness.engine.num_draft_tokens > 0


def test_draft_model_computes_long_prompts_in_chunks() -> None:
    harness = speculative_harness(model("llama"), 3, max_batched_tokens=16)
    batches = record_batches(harness)
    prompts = [[*range(6, 106)], [*range(10, 100)], [8, 9]]
    sequences = harness.generate([Sequence(prompt, 20) for prompt in prompts])
    plain = EngineHarness("llama").generate([Sequence(prompt, 20) for prompt in prompts])
    assert tokens_of(sequences) == tokens_of(plain)
    assert max(sum(len(inputs.tokens) for inputs in batch) for batch in batches) <= 18  # one more for each in decode
    assert harness.engine.num_accepted_tokens > 0


def test_draft_model_that_fails_proposes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    cases = requests("llama")[:6]
    not_finite, failing = copy.deepcopy(model("llama")), copy.deepcopy(model("llama"))
    harnesses = [EngineHarness("llama", num_speculative_tokens=4, draft_model=draft) for draft in (not_finite, failing)]
    with torch.no_grad():
        not_finite.get_input_embeddings().weight[6:200] = torch.nan  # type: ignore[operator]
    proposer: Any = harnesses[1].engine.proposer
    proposer.runner.run = lambda batch: 1 / 0
    for harness in harnesses:
        sequences = harness.generate([case.sequence() for case in cases])
        assert tokens_of(sequences) == [case.expected for case in cases]
        assert [sequence.error for sequence in sequences] == [""] * 6
    assert harnesses[1].engine.num_draft_tokens == 0
    assert "the draft model failed" in caplog.text


def test_draft_model_with_fewer_positions_or_tokens_proposes_what_it_can() -> None:
    cases = requests("llama")
    config = CONFIGS["llama"]()
    config.max_position_embeddings, config.vocab_size = 32, 290
    torch.manual_seed(0)
    short = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    harness = EngineHarness("llama", num_speculative_tokens=4, draft_model=short)
    batches = record_batches(harness)
    prompts = [([299, *case.prompt], case.max_tokens) for case in cases]
    sequences = harness.generate([Sequence(prompt, max_tokens) for prompt, max_tokens in prompts])
    plain = EngineHarness("llama").generate([Sequence(prompt, max_tokens) for prompt, max_tokens in prompts])
    assert tokens_of(sequences) == tokens_of(plain)
    assert harness.engine.num_draft_tokens > 0
    assert max(inputs.num_computed_tokens + len(inputs.tokens) for batch in batches for inputs in batch) <= 32
    assert isinstance(harness.engine.proposer, DraftModel)


@pytest.mark.parametrize(
    ("family", "draft", "whose"), [("bloom", "llama", "the bundle"), ("llama", "gemma2", "serve.draft_model")]
)
def test_model_that_cannot_roll_back_is_refused(family: str, draft: str, whose: str) -> None:
    with pytest.raises(UserError, match=f"serve.draft_model: the attention of {whose} can't roll back"):
        EngineHarness(family, num_speculative_tokens=4, draft_model=copy.deepcopy(model(draft)))


@pytest.fixture(scope="module")
def writers(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("drafts")
    small = with_values(tiny, {"model.num_hidden_layers": 1})
    other = with_values(tiny, {"data.vocab_size": 600, "data.name": "other"})
    return {
        "large": fresh_bundle(tiny, folder / "large" / "bundle"),
        "small": fresh_bundle(small, folder / "small" / "bundle", seed=1),
        "other": fresh_bundle(other, folder / "other" / "bundle"),
    }


def test_replica_generates_the_same_with_a_draft_model(writers: dict[str, Bundle]) -> None:
    job = CompletionRequest(prompt="import os\nimport", max_tokens=60, temperature=0).job()
    texts, stats = [], []
    for draft in (None, "large", "small"):
        folder = str(writers[draft].folder) if draft else None
        options = ServeConfig(precision="fp32", num_speculative_tokens=4 if draft else 0, draft_model=folder)
        replica = Replica(str(writers["large"].folder), asdict(options))
        result = asyncio.run(replica.complete(job))
        assert isinstance(result, GenerationResult)
        texts.append([choice.text for choice in result.choices])
        stats.append(replica.load_stats())
    assert texts[0] == texts[1] == texts[2]
    assert stats[1]["right_tokens"] > 30
    assert stats[1]["steps"] < stats[0]["steps"] / 2
    assert stats[2]["guessed_tokens"] > 0


def test_unfit_draft_model_is_refused_before_anything_starts(
    writers: dict[str, Bundle], tiny: Config, tiny_functions: Config, tmp_path: Path
) -> None:
    large = writers["large"]
    values = {"bundle": "large", "serve.num_speculative_tokens": 4}
    classifier = fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")
    for draft, message in (
        (writers["other"], r"another tokenizer than .*600 tokens and 512"),
        (classifier, "is for classification"),
    ):
        options = with_values(tiny, values | {"serve.draft_model": str(draft.folder)}).serve
        with pytest.raises(UserError, match=message):
            check_servable(large, options)
    with pytest.raises(UserError, match=r"serve\.draft_model: bundle=gone is neither"):
        resolve_draft_model(with_values(tiny, values | {"serve.draft_model": "gone"}))
    with pytest.raises(
        UserError, match=r"serve\.draft_model proposes serve\.num_speculative_tokens tokens, and that is 0"
    ):
        with_values(tiny, values | {"serve.draft_model": "small", "serve.num_speculative_tokens": 0})
    with pytest.raises(UserError, match=r"serve\.draft_model is for one bundle"):
        with_values(tiny, values | {"serve.draft_model": "small", "bundle": "a+b"})


def test_another_draft_model_is_another_version(writers: dict[str, Bundle], tiny: Config, tmp_path: Path) -> None:
    folder = tmp_path / "small" / "bundle"
    shutil.copytree(writers["small"].folder, folder)
    config = resolve_draft_model(
        with_values(tiny, {"runs_dir": str(tmp_path), "serve.draft_model": "small", "serve.num_speculative_tokens": 4})
    )
    assert config.serve.draft_model == str(folder)
    apps = {make_version("writer", writers["large"], options).app for options in (tiny.serve, config.serve)}
    shutil.rmtree(folder)
    shutil.copytree(writers["large"].folder, folder)
    assert len(apps | {make_version("writer", writers["large"], config.serve).app}) == 3


def test_draft_model_leaves_the_sequences_random_numbers() -> None:
    sequence = Sequence([7], 5, SamplingParams(1.0), seed=3)
    rng = random.Random(3)
    speculative_harness(model("llama")).generate([sequence])
    num_sampled = len(sequence.tokens) + (sequence.finish_reason == "stop")
    following = [rng.random() for _ in range(num_sampled + 3)][num_sampled:]
    assert [sequence.rng.random() for _ in range(3)] == following


def test_endpoint_with_draft_model_and_8_bit_weights(ray: None, writers: dict[str, Bundle], tiny: Config) -> None:
    draft = writers["large"].folder  # with fresh weights, tokens of another model would hardly ever be accepted
    values = {"serve.port": free_port(), "serve.max_replicas": 1, "serve.precision": "fp32", "serve.quantize": "int8",
              "serve.draft_model": str(draft), "serve.num_speculative_tokens": 4}  # fmt: skip
    config = with_values(tiny, values)
    endpoint = deploy(config, {"writer": writers["large"].folder})
    try:
        body = {"prompt": "import os\nimport", "max_tokens": 60, "temperature": 0}
        text = httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        metrics = httpx.get(f"{endpoint.url}/metrics", timeout=60).text
    finally:
        endpoint.stop()
    own_model = load_model(writers["large"], config.serve)
    (expected,) = writers["large"].objective().predict(own_model, [{"prompt": body["prompt"], "max_tokens": 60}])
    assert text == expected["text"]
    values_by_name = {
        line.split("{")[0]: float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("manta_replica_")
    }
    assert values_by_name["manta_replica_draft_forwards_total"] > 0
    assert (
        0 < values_by_name["manta_replica_right_tokens_total"] <= values_by_name["manta_replica_guessed_tokens_total"]
    )

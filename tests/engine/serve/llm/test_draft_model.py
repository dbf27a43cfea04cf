"""A smaller model that guesses changes how many forwards a text takes, and no token, chance or score."""

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
from engine.serve.preflight import check_servable
from engine.serve.http.schemas import CompletionRequest
from engine.serve.llm.sequence import Sequence
from engine.serve.jobs import SamplingParams
from engine.serve.llm.speculative import DraftModel
from engine.serve.load_model import load_model
from engine.serve.replica import Replica
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.engine.serve.llm.test_engine import CONFIGS, EOS, EngineHarness, model, requests
from tests.ports import free_port

DRAFTS = {"llama": "gpt2", "gpt2": "llama", "qwen2": "qwen2"}  # of another family, but for one


@functools.cache
def near(kind: str) -> nn.Module:
    """Return a model that mostly writes what the kind's does."""
    made = copy.deepcopy(model(kind))
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p += 0.02 * p.std() * torch.randn(p.shape, generator=dice)
    return made


def shares_of(harness: EngineHarness) -> tuple[int, int]:
    load = harness.engine.stats
    return load["right_tokens"], load["guessed_tokens"]


@pytest.mark.parametrize("kind", DRAFTS)
def test_greedy_is_generate_whatever_the_draft_guesses(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    asked = requests(kind)
    plain = EngineHarness(kind)
    plain.generate([Sequence(prompt, most) for prompt, most, _ in asked])
    for draft in (model(kind), near(kind), model(DRAFTS[kind])):
        harness = EngineHarness(kind, num_speculative_tokens=4, draft_model=copy.deepcopy(draft))
        together = harness.generate([Sequence(prompt, most) for prompt, most, _ in asked])
        assert [it.tokens for it in together] == [right for *_, right in asked]
        joining = [Sequence(prompt, most) for prompt, most, _ in asked]
        for completion in joining:  # in mid-flight, on lanes that others have left
            harness.engine.submit([completion])
        assert [it.tokens for it in harness.wait(joining)] == [right for *_, right in asked]
        right, guessed = shares_of(harness)
        if draft is model(kind):  # it guesses what it would write itself, but for the end, which is never in a text
            assert right > 0.9 * guessed
            assert harness.engine.stats["steps"] < 2 * plain.engine.stats["steps"] * 0.6
        elif draft is near(kind):
            assert 0.3 * guessed < right < guessed
        assert harness.engine.stats["draft_forwards"] > 0
    assert not caplog.records, "a draft that pauses, for it is rarely right, does not fail"


def test_a_draft_changes_no_chance_and_no_score() -> None:
    samplings = [
        SamplingParams(), SamplingParams(0.5), SamplingParams(1.0, top_p=0.9), SamplingParams(1.0, top_k=5), SamplingParams(0.7, frequency_penalty=0.5),
        SamplingParams(logit_bias={7: 5.0}), SamplingParams(1.0),
    ]  # fmt: skip
    prompt, found = requests("llama")[1][0], []
    for draft in (None, model("llama"), near("llama"), model("gpt2")):
        harness = EngineHarness("llama", num_speculative_tokens=4 if draft else 0, draft_model=copy.deepcopy(draft))
        asked = [Sequence(prompt, 40, sampling, seed=i, num_logprobs=2) for i, sampling in enumerate(samplings)]
        found.append([(it.tokens, it.finish_reason, it.token_logprobs) for it in harness.generate(asked)])
        if draft is near("llama"):  # the two throw the same dice
            right, guessed = shares_of(harness)
            assert right > 0.5 * guessed
    for other in found[1:]:
        for (tokens, reason, scores), (right_tokens, why, wanted) in zip(other, found[0], strict=True):
            assert (tokens, reason) == (right_tokens, why)
            assert [it.token for it in scores] == [it.token for it in wanted]
            assert [it.logprob for it in scores] == pytest.approx([it.logprob for it in wanted], abs=1e-4)


def test_what_is_sampled_follows_the_models_distribution() -> None:
    """Counts of a first and a second token over many seeds, beside the model's own probabilities (chi-squared)."""
    harness = EngineHarness("llama", num_speculative_tokens=2, draft_model=copy.deepcopy(near("llama")), max_num_seqs=16, max_queue=5000)
    prompt, draws, way = [7, 9, 11], 2000, SamplingParams(1.0, top_k=4, logit_bias={EOS: -100.0})
    found = harness.generate([Sequence(prompt, 3, way, seed=seed) for seed in range(draws)])
    assert harness.engine.num_draft_tokens > draws / 4
    with torch.no_grad():
        for before in {tuple(it.tokens[:1]) for it in found}:
            rows = [it.tokens for it in found if tuple(it.tokens[:1]) == before]
            logits = model("llama")(torch.tensor([prompt + list(before)])).logits[0, -1]
            logits[EOS] -= 100
            top = logits.topk(4)
            chances = top.values.double().softmax(0).tolist()
            counts = [sum(row[1] == token for row in rows) for token in top.indices.tolist()]
            assert sum(counts) == len(rows)
            expected = [chance * len(rows) for chance in chances]
            likely = [(count, mean) for count, mean in zip(counts, expected, strict=True) if mean > 5]
            assert sum((count - mean) ** 2 / mean for count, mean in likely) < 21.1  # 3 degrees: one in ten thousand


def test_the_drafts_cache_is_as_bounded_as_the_models() -> None:
    asked = requests("llama")
    harness = EngineHarness("llama", num_speculative_tokens=4, draft_model=copy.deepcopy(near("llama")), kv_cache_tokens=128)
    found = harness.generate([Sequence(prompt, most) for prompt, most, _ in asked])
    assert [it.tokens for it in found] == [right for *_, right in asked]
    guesser: Any = harness.engine.proposer
    assert guesser.forward.lanes * guesser.forward.capacity <= 128
    assert (guesser.forward.lanes, guesser.forward.capacity) == (
        harness.engine.shape.lanes,
        harness.engine.shape.capacity,
    )
    assert guesser.token_bytes == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes


def test_a_beginning_that_the_draft_has_read_is_not_read_again() -> None:
    harness = EngineHarness("llama", num_speculative_tokens=3, draft_model=copy.deepcopy(model("llama")), max_batched_tokens=256)
    read: list[int] = []
    guesser: Any = harness.engine.proposer
    forward = guesser.forward.run
    guesser.forward.run = lambda parts: (read.extend(len(part.tokens) for part in parts), forward(parts))[1]
    system = [number % 290 + 6 for number in range(0, 600, 11)]
    (first,) = harness.generate([Sequence([*system, 7, 8], 12)])
    assert max(read) == len(system) + 3
    read.clear()
    (again,) = harness.generate([Sequence([*system, 7, 8], 12)])
    assert again.tokens == first.tokens
    assert max(read) <= 2
    read.clear()
    harness.generate([Sequence([*system, 9], 8) for _ in range(3)])
    assert max(read) <= 3
    assert sum(shares_of(harness)) > 0


def test_a_long_prompt_is_read_by_the_draft_in_parts() -> None:
    harness = EngineHarness("llama", num_speculative_tokens=3, draft_model=copy.deepcopy(model("llama")), max_batched_tokens=16)
    longest = 0
    guesser: Any = harness.engine.proposer
    forward = guesser.forward.run

    def noted(parts: Any) -> Any:
        nonlocal longest
        longest = max(longest, sum(len(part.tokens) for part in parts))
        return forward(parts)

    guesser.forward.run = noted
    prompts = [[*range(6, 106)], [*range(10, 100)], [8, 9]]
    found = harness.generate([Sequence(prompt, 20) for prompt in prompts])
    plain = EngineHarness("llama").generate([Sequence(prompt, 20) for prompt in prompts])
    assert [it.tokens for it in found] == [it.tokens for it in plain]
    assert longest <= 18  # one token more for each that writes
    assert harness.engine.num_accepted_tokens > 0


def test_a_draft_that_fails_or_is_mad_guesses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    asked = requests("llama")[:6]
    mad, broken = copy.deepcopy(model("llama")), copy.deepcopy(model("llama"))
    runs = [EngineHarness("llama", num_speculative_tokens=4, draft_model=draft) for draft in (mad, broken)]
    with torch.no_grad():
        mad.get_input_embeddings().weight[6:200] = torch.nan  # type: ignore[operator]
    guesser: Any = runs[1].engine.proposer
    guesser.forward.run = lambda parts: 1 / 0
    for harness in runs:
        found = harness.generate([Sequence(prompt, most) for prompt, most, _ in asked])
        assert [it.tokens for it in found] == [right for *_, right in asked]
        assert [it.error for it in found] == [""] * 6
    assert runs[1].engine.num_draft_tokens == 0
    assert "the draft failed" in caplog.text


def test_a_draft_with_fewer_positions_or_tokens_guesses_what_it_can() -> None:
    asked = requests("llama")
    config = CONFIGS["llama"]()
    config.max_position_embeddings, config.vocab_size = 32, 290
    torch.manual_seed(0)
    short = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    harness = EngineHarness("llama", num_speculative_tokens=4, draft_model=short)
    longest = 0
    guesser: Any = harness.engine.proposer
    forward = guesser.forward.run

    def noted(parts: Any) -> Any:
        nonlocal longest
        longest = max(longest, *(part.past + len(part.tokens) for part in parts))
        return forward(parts)

    guesser.forward.run = noted
    found = harness.generate([Sequence([299, *prompt], most) for prompt, most, _ in asked])
    plain = EngineHarness("llama").generate([Sequence([299, *prompt], most) for prompt, most, _ in asked])
    assert [it.tokens for it in found] == [it.tokens for it in plain]
    assert harness.engine.num_draft_tokens > 0
    assert longest <= 32
    assert isinstance(guesser, DraftModel)


@pytest.mark.parametrize(
    ("kind", "draft", "whose"), [("bloom", "llama", "the bundle"), ("llama", "gemma2", "serve.draft_model")]
)
def test_what_cannot_go_back_on_guesses_is_refused(kind: str, draft: str, whose: str) -> None:
    with pytest.raises(UserError, match=f"serve.draft_model: the attention of {whose} can't go back"):
        EngineHarness(kind, num_speculative_tokens=4, draft_model=copy.deepcopy(model(draft)))


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


def test_a_replica_guesses_by_its_draft(writers: dict[str, Bundle]) -> None:
    job = CompletionRequest(prompt="import os\nimport", max_tokens=60, temperature=0).job()
    found, figures = [], []
    for draft in (None, "large", "small"):
        folder = str(writers[draft].folder) if draft else None
        options = ServeConfig(precision="fp32", num_speculative_tokens=4 if draft else 0, draft_model=folder)
        replica = Replica(str(writers["large"].folder), asdict(options))
        found.append([it["text"] for it in asyncio.run(replica.complete(job))["choices"]])
        figures.append(replica.stats())
    assert found[0] == found[1] == found[2]
    assert figures[1]["right_tokens"] > 30
    assert figures[1]["steps"] < figures[0]["steps"] / 2
    assert figures[2]["guessed_tokens"] > 0


def test_a_draft_of_other_tokens_is_refused_before_anything_starts(
    writers: dict[str, Bundle], tiny: Config, tiny_functions: Config, tmp_path: Path
) -> None:
    large = writers["large"]
    asked = {"bundle": "large", "serve.num_speculative_tokens": 4}
    for draft, told in (("other", r"another tokenizer than .*600 tokens and 512"), ("namer", "is for classification")):
        if draft == "namer":
            writers = writers | {"namer": fresh_bundle(tiny_functions, tmp_path / "namer" / "bundle")}
        options = with_values(tiny, asked | {"serve.draft_model": str(writers[draft].folder)}).serve
        with pytest.raises(UserError, match=told):
            check_servable(large, options)
    with pytest.raises(UserError, match=r"serve\.draft: bundle=gone is neither"):
        resolve_draft_model(with_values(tiny, asked | {"serve.draft_model": "gone"}))
    with pytest.raises(
        UserError, match=r"serve\.draft_model proposes serve\.num_speculative_tokens tokens, and that is 0"
    ):
        with_values(tiny, asked | {"serve.draft_model": "small", "serve.num_speculative_tokens": 0})
    with pytest.raises(UserError, match=r"serve\.draft is for one bundle"):
        with_values(tiny, asked | {"serve.draft_model": "small", "bundle": "a+b"})


def test_another_draft_is_another_version(writers: dict[str, Bundle], tiny: Config, tmp_path: Path) -> None:
    place = tmp_path / "small" / "bundle"
    shutil.copytree(writers["small"].folder, place)
    config = resolve_draft_model(
        with_values(tiny, {"runs_dir": str(tmp_path), "serve.draft_model": "small", "serve.num_speculative_tokens": 4})
    )
    assert config.serve.draft_model == str(place)
    marks = {make_version("writer", writers["large"], options).app for options in (tiny.serve, config.serve)}
    shutil.rmtree(place)
    shutil.copytree(writers["large"].folder, place)
    assert len(marks | {make_version("writer", writers["large"], config.serve).app}) == 3


def test_dice_are_looked_at_and_not_thrown() -> None:
    it = Sequence([7], 5, SamplingParams(1.0), seed=3)
    other = random.Random(3)
    EngineHarness("llama", num_speculative_tokens=4, draft_model=copy.deepcopy(model("llama"))).generate([it])
    drawn = len(it.tokens) + (it.finish_reason == "stop")
    assert [it.rng.random() for _ in range(3)] == [other.random() for _ in range(drawn + 3)][drawn:]


def test_an_endpoint_with_a_draft_and_weights_of_8_bits(ray: None, writers: dict[str, Bundle], tiny: Config) -> None:
    same = writers["large"].folder  # fresh weights of another model would hardly ever guess right
    asked = {"serve.port": free_port(), "serve.max_replicas": 1, "serve.precision": "fp32", "serve.quantize": "int8",
             "serve.draft_model": str(same), "serve.num_speculative_tokens": 4}  # fmt: skip
    config = with_values(tiny, asked)
    up = deploy(config, {"writer": writers["large"].folder})
    try:
        body = {"prompt": "import os\nimport", "max_tokens": 60, "temperature": 0}
        text = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        told = httpx.get(f"{up.url}/metrics", timeout=60).text
    finally:
        up.stop()
    model = load_model(writers["large"], config.serve)
    (right,) = writers["large"].objective().predict(model, [{"prompt": body["prompt"], "max_tokens": 60}])
    assert text == right["text"]
    figures = {
        line.split("{")[0]: float(line.split()[-1]) for line in told.splitlines() if line.startswith("manta_replica_")
    }
    assert figures["manta_replica_draft_forwards_total"] > 0
    assert 0 < figures["manta_replica_right_tokens_total"] <= figures["manta_replica_guessed_tokens_total"]

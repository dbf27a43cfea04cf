"""Continuous batching against `model.generate`: the same tokens, whatever is batched, aborted, or shared in the cache."""

from __future__ import annotations

import copy
import itertools
import time

import pytest
import torch
import transformers

from engine.serve.jobs import SamplingParams
from engine.serve.llm.model_runner import MAX_FP32_ELEMENTS, BatchedRunner, SequentialRunner, make_runner
from engine.serve.llm.sequence import QueueFull, Sequence
from tests.engine.serve.clients import wait_for
from tests.engine.serve.llm.engine_harness import CONFIGS, EOS, EngineHarness, model, requests, tokens_of
from tests.engine.serve.llm.paused_engine import paused


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_equal_generate_in_any_batch(family: str) -> None:
    harness, cases = EngineHarness(family), requests(family)
    expected = [case.expected for case in cases]
    assert isinstance(harness.engine.runner, SequentialRunner if family in ("bloom", "gemma2") else BatchedRunner)
    assert [harness.generate([case.sequence()])[0].tokens for case in cases[:4]] == expected[:4]
    batched = harness.generate([case.sequence() for case in cases])
    assert tokens_of(batched) == expected
    assert {sequence.finish_reason for sequence in batched} <= {"stop", "length"}
    joining = [case.sequence() for case in cases]
    for sequence in joining:  # between forwards
        harness.engine.submit([sequence])
        time.sleep(0.002)
    assert tokens_of(harness.wait(joining)) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cache_too_small_for_all_changes_no_token(family: str) -> None:
    cases = requests(family)
    harness = EngineHarness(family, kv_cache_tokens=128)  # 5 slots of 25 tokens; one of 128 for a long sequence
    assert tokens_of(harness.generate([case.sequence() for case in cases])) == [case.expected for case in cases]
    assert harness.engine.kv_cache.num_total_tokens <= 128
    with pytest.raises(ValueError, match="128 tokens"):
        harness.engine.submit([Sequence([7] * 100, 29)])


def test_model_still_generates_by_itself() -> None:
    prompt, max_tokens, expected = requests("llama")[0]
    assert isinstance(make_runner(model("llama")), BatchedRunner)
    ids = torch.tensor([prompt, prompt])
    output = model("llama").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)  # type: ignore[operator]  # fmt: skip
    assert output[:, len(prompt) : len(prompt) + len(expected)].tolist() == [expected, expected]


def test_cached_prefix_is_not_computed_again() -> None:
    harness = EngineHarness("llama", max_batched_tokens=256)
    system = [number % 290 + 6 for number in range(0, 600, 11)]
    first = harness.generate([Sequence([*system, 7, 8], 5)])[0]
    again = harness.generate([Sequence([*system, 7, 8], 5)])[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, len(system) + 1)
    assert again.tokens == first.tokens
    batch = harness.generate([Sequence([*system, 9], 5) for _ in range(4)])  # three wait for the first one's prefill
    assert [sequence.num_cached_tokens for sequence in batch] == [len(system)] * 4
    assert len({tuple(sequence.tokens) for sequence in batch}) == 1


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    harness = EngineHarness("llama", max_batched_tokens=256)
    batch = harness.generate([Sequence(list(range(6, 76)), 3) for _ in range(4)])
    assert sorted(sequence.num_cached_tokens for sequence in batch) == [0, 69, 69, 69]


def test_seed_repeats_in_any_batch() -> None:
    harness, cases = EngineHarness("llama"), requests("llama")
    prompt = cases[1].prompt
    samplings = [SamplingParams(1.0), SamplingParams(0.8, top_p=0.9), SamplingParams(1.2, top_k=20, frequency_penalty=0.5)]  # fmt: skip
    alone = [harness.generate([Sequence(prompt, 30, sampling, seed=3)])[0].tokens for sampling in samplings]
    others = [case.sequence(sampling=SamplingParams(1.0)) for case in cases[:6]]
    seeded = [Sequence(prompt, 30, sampling, seed=3) for sampling in samplings]
    harness.generate(list(itertools.chain.from_iterable(zip(others[::2], seeded, others[1::2], strict=True))))
    assert tokens_of(seeded) == alone
    assert harness.generate([Sequence(prompt, 30, samplings[0], seed=4)])[0].tokens != alone[0]


def test_logprobs_are_the_models_own() -> None:
    harness = EngineHarness("gpt2", max_batched_tokens=7)  # the prompt's log-probabilities come from several chunks
    prompt = requests("gpt2")[0].prompt
    sequence = Sequence(prompt, 6, SamplingParams(1.5), seed=0, num_logprobs=3, needs_prompt_logprobs=True)
    harness.generate([sequence])
    with torch.no_grad():
        logits = model("gpt2")(torch.tensor([prompt + sequence.tokens])).logits[0]
    expected = logits.log_softmax(-1)
    logprobs = [*sequence.prompt_logprobs, *sequence.token_logprobs]
    assert [entry.token for entry in logprobs] == [*prompt, *sequence.tokens][1:]
    for row, entry in zip(expected, logprobs, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
    (scored,) = harness.generate([Sequence(prompt, 0, num_logprobs=0, needs_prompt_logprobs=True)])
    assert (scored.tokens, scored.finish_reason, len(scored.prompt_logprobs)) == ([], "length", len(prompt) - 1)


def test_aborted_and_expired_sequences_take_no_slot() -> None:
    harness = EngineHarness("llama", max_num_seqs=1, max_queue=2)
    slow = Sequence([7], 120, SamplingParams(logit_bias={EOS: -100.0}))
    with paused(harness.engine, after=3):
        harness.engine.submit([slow])
        wait_for(lambda: slow.tokens)
        expired, aborted = Sequence([8], 5, deadline=time.monotonic() - 1), Sequence([9], 5)
        harness.engine.submit([expired, aborted])
        with pytest.raises(QueueFull):
            harness.engine.submit([Sequence([9], 5)])
        harness.engine.abort([slow, aborted])
    harness.wait([slow, expired, aborted])
    assert [slow.finish_reason, expired.finish_reason] == ["abort", "expired"]
    assert [aborted.tokens, expired.tokens] == [[], []]
    assert len(slow.tokens) < 120
    assert harness.generate([Sequence([9], 2)])[0].finish_reason
    assert harness.engine.stats["running"] == 0


def test_queue_is_fair_between_clients() -> None:
    harness = EngineHarness("llama", max_num_seqs=1)
    many, few = [Sequence([7], 4, client="many") for _ in range(6)], Sequence([7], 4, client="few")
    harness.generate([*many, few])
    assert sum(sequence.finished_at < few.finished_at for sequence in many) <= 2


@pytest.mark.parametrize(("family", "num_speculative_tokens"), [("llama", 0), ("llama", 4), ("bloom", 0)])
def test_failed_step_is_retried_for_the_other_sequences(family: str, num_speculative_tokens: int) -> None:
    harness = EngineHarness(family, num_speculative_tokens=num_speculative_tokens)
    cases = requests(family)[:3]
    valid, invalid = [case.sequence() for case in cases], Sequence([10**9], 5)  # no such token
    with paused(harness.engine, after=9):  # the first one has some tokens by then
        harness.engine.submit(valid)
        wait_for(lambda: valid[0].tokens)
        harness.engine.submit([invalid])
    harness.wait([*valid, invalid])
    assert invalid.finish_reason == "error"
    assert [sequence.error for sequence in valid] == [""] * 3
    assert tokens_of(valid) == [case.expected for case in cases]


def test_slot_is_clean_after_logits_that_are_not_finite() -> None:
    torch.manual_seed(0)
    broken = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32).eval()
    harness = EngineHarness(broken, max_num_seqs=1, max_queue=4, max_batched_tokens=64)
    with torch.no_grad():
        broken.get_input_embeddings().weight[17] = torch.nan
    harness.engine.submit([Sequence([6, 17], 5), Sequence([6, 18, 19], 5)])
    failed, valid = harness.finished.get(timeout=30), harness.finished.get(timeout=30)
    assert (failed.finish_reason, failed.error) == ("error", "the model's output is not a finite number")
    assert valid.finish_reason == "length"


@pytest.mark.parametrize("max_elements", [MAX_FP32_ELEMENTS, 0])
def test_bf16_attention_is_near_the_models_in_any_batch(monkeypatch: pytest.MonkeyPatch, max_elements: int) -> None:
    monkeypatch.setattr("engine.serve.llm.model_runner.MAX_FP32_ELEMENTS", max_elements)
    harness = EngineHarness(copy.deepcopy(model("llama")).bfloat16(), num_speculative_tokens=3)
    prompts = [case.prompt for case in requests("llama")[:5]]
    never_ends = SamplingParams(logit_bias={EOS: -100.0})
    sequences = harness.generate([Sequence(prompt, 8, never_ends, num_logprobs=0) for prompt in prompts])
    for prompt, sequence in zip(prompts, sequences, strict=True):
        ids = torch.tensor([prompt + sequence.tokens])
        with torch.no_grad():
            expected = model("llama")(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for entry, row in zip(sequence.token_logprobs, expected, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=0.25)

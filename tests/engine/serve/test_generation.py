"""Continuous batching against `model.generate`: the same tokens, whatever joins, leaves, or shares the cache."""

from __future__ import annotations

import copy
import functools
import itertools
import queue
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from engine.serve.llm.engine import Completion, QueueFull, TransformersEngine
from engine.serve.llm.model_runner import AS_FLOATS, BatchedRunner, SequentialRunner, make_forward
from engine.serve.llm.sampler import SamplingParams
from tests.engine.serve.clients import wait_for
from tests.engine.serve.holding import held

EOS = 5
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "eos_token_id": EOS, "bos_token_id": 1}
LLAMA_SIZES = SIZES | {"hidden_size": 32, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}  # fmt: skip
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_SIZES),
    "gpt2": lambda: transformers.GPT2Config(**SIZES, n_embd=32, n_positions=128),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA_SIZES),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=300, eos_token_id=EOS),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA_SIZES, head_dim=8),
}


@functools.cache
def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in built.parameters():
            if p.ndim > 1:
                p.mul_(8)  # large enough for its answers to differ
    return built


@functools.cache
def requests(kind: str) -> list[tuple[list[int], int, list[int]]]:
    """Ragged (prompt, max_tokens, what `generate` gives alone without its end)."""
    dice = random.Random(0)
    asked = [([dice.randrange(6, 300) for _ in range(dice.randrange(1, 50))], dice.randrange(1, 60)) for _ in range(12)]
    asked += [([*asked[3][0], 7, 8], 20), ([*asked[3][0], 7, 9], 20)]  # that begin alike
    found = []
    for prompt, most in asked:
        ids = torch.tensor([prompt])
        whole = model(kind).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0)  # fmt: skip
        new = whole[0, len(prompt) :].tolist()
        found.append((prompt, most, new[:-1] if new[-1] == EOS else new))
    return found


class Run:
    """A generator, of a kind's model or a given one, whose ended completions can be waited for."""

    def __init__(self, kind: str | nn.Module, **options: Any) -> None:
        self.ended: queue.Queue[Completion] = queue.Queue()
        sizes: dict = {"max_num_seqs": 5, "max_queue": 100, "max_batched_tokens": 24, "cache_tokens": None} | options
        own = model(kind) if isinstance(kind, str) else kind
        self.generator = TransformersEngine(
            own, 128, **sizes, tell=lambda news: [self.ended.put(it) for it in news if it.reason]
        )

    def all(self, completions: list[Completion]) -> list[Completion]:
        self.generator.submit(completions)
        return self.wait(completions)

    def wait(self, completions: list[Completion]) -> list[Completion]:
        for _ in completions:
            self.ended.get(timeout=60)
        return completions


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_is_generate_in_any_company(kind: str) -> None:
    run = Run(kind)
    asked = requests(kind)
    assert isinstance(run.generator.forward, SequentialRunner if kind in ("bloom", "gemma2") else BatchedRunner)
    alone = [run.all([Completion(prompt, most)])[0] for prompt, most, _ in asked[:4]]
    assert [it.tokens for it in alone] == [right for *_, right in asked[:4]]
    together = run.all([Completion(prompt, most) for prompt, most, _ in asked])
    assert [it.tokens for it in together] == [right for *_, right in asked]
    assert {it.reason for it in together} <= {"stop", "length"}
    joining = [Completion(prompt, most) for prompt, most, _ in asked]
    for completion in joining:  # in mid-flight
        run.generator.submit([completion])
        time.sleep(0.002)
    assert [it.tokens for it in run.wait(joining)] == [right for *_, right in asked]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_too_small_for_all_changes_no_token(kind: str) -> None:
    asked = requests(kind)
    run = Run(kind, cache_tokens=128)  # 5 lanes of 25 tokens; one of 128 for a long one
    found = run.all([Completion(prompt, most) for prompt, most, _ in asked])
    assert [it.tokens for it in found] == [right for *_, right in asked]
    assert run.generator.shape.lanes * run.generator.shape.capacity <= 128
    with pytest.raises(ValueError, match="128 tokens"):
        run.generator.submit([Completion([7] * 100, 29)])


def test_the_model_still_answers_by_itself() -> None:
    prompt, most, right = requests("llama")[0]
    assert isinstance(make_forward(model("llama")), BatchedRunner)
    ids = torch.tensor([prompt, prompt])
    both = model("llama").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0)  # fmt: skip
    assert both[:, len(prompt) : len(prompt) + len(right)].tolist() == [right, right]


def test_a_beginning_that_was_read_is_not_read_again() -> None:
    run = Run("llama", max_batched_tokens=256)
    system = [dice % 290 + 6 for dice in range(0, 600, 11)]
    first = run.all([Completion([*system, 7, 8], 5)])[0]
    again = run.all([Completion([*system, 7, 8], 5)])[0]
    assert (first.reused, again.reused) == (0, len(system) + 1)
    assert again.tokens == first.tokens
    many = run.all([Completion([*system, 9], 5) for _ in range(4)])  # three wait for the first to read, and share
    assert [it.reused for it in many] == [len(system)] * 4
    assert len({tuple(it.tokens) for it in many}) == 1


def test_copies_that_come_together_read_once() -> None:
    run = Run("llama", max_batched_tokens=256)
    found = run.all([Completion(list(range(6, 76)), 3) for _ in range(4)])
    assert sorted(it.reused for it in found) == [0, 69, 69, 69]


def test_a_seed_repeats_in_any_company() -> None:
    run = Run("llama")
    prompt = requests("llama")[1][0]
    ways = [SamplingParams(1.0), SamplingParams(0.8, top_p=0.9), SamplingParams(1.2, top_k=20, frequency_penalty=0.5)]
    alone = [run.all([Completion(prompt, 30, way, seed=3)])[0].tokens for way in ways]
    others = [Completion(other, most, SamplingParams(1.0)) for other, most, _ in requests("llama")[:6]]
    seeded = [Completion(prompt, 30, way, seed=3) for way in ways]
    run.all(list(itertools.chain.from_iterable(zip(others[::2], seeded, others[1::2], strict=True))))
    assert [it.tokens for it in seeded] == alone
    assert run.all([Completion(prompt, 30, ways[0], seed=4)])[0].tokens != alone[0]


def test_scores_are_the_models_own() -> None:
    run = Run("gpt2", max_batched_tokens=7)  # the prompt is scored over several chunks
    prompt = requests("gpt2")[0][0]
    (it,) = run.all([Completion(prompt, 6, SamplingParams(1.5), seed=0, logprobs=3, score_prompt=True)])
    with torch.no_grad():
        logits = model("gpt2")(torch.tensor([prompt + it.tokens])).logits[0]
    right = logits.log_softmax(-1)
    told = [*it.prompt_scores, *it.scores]
    assert [score.token for score in told] == [*prompt, *it.tokens][1:]
    for row, score in zip(right, told, strict=False):
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-4)
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()
    (only,) = run.all([Completion(prompt, 0, logprobs=0, score_prompt=True)])
    assert (only.tokens, only.reason, len(only.prompt_scores)) == ([], "length", len(prompt) - 1)


def test_who_left_or_waited_too_long_takes_no_lane() -> None:
    run = Run("llama", max_num_seqs=1, max_queue=2)
    slow = Completion([7], 120, SamplingParams(bias={EOS: -100.0}))
    with held(run.generator, after=3):
        run.generator.submit([slow])
        wait_for(lambda: slow.tokens)
        late, left = Completion([8], 5, deadline=time.monotonic() - 1), Completion([9], 5)
        run.generator.submit([late, left])
        with pytest.raises(QueueFull):
            run.generator.submit([Completion([9], 5)])
        run.generator.cancel([slow, left])
    run.wait([slow, late, left])
    assert [late.reason, left.tokens, late.tokens] == ["expired", [], []]
    assert len(slow.tokens) < 120
    assert run.all([Completion([9], 2)])[0].reason
    assert run.generator.load["running"] == 0


def test_users_take_turns() -> None:
    run = Run("llama", max_num_seqs=1)
    order: list[str] = []
    run.generator.tell = lambda news: [(order.append(it.client), run.ended.put(it)) for it in news if it.reason]  # type: ignore[func-returns-value]
    run.all([Completion([7], 4, client="many") for _ in range(6)] + [Completion([7], 4, client="few")])
    assert order.index("few") <= 2


@pytest.mark.parametrize(("kind", "num_speculative_tokens"), [("llama", 0), ("llama", 4), ("bloom", 0)])
def test_a_step_that_failed_is_run_again_for_the_others(kind: str, num_speculative_tokens: int) -> None:
    run = Run(kind, num_speculative_tokens=num_speculative_tokens)
    asked = requests(kind)[:3]
    good = [Completion(prompt, most) for prompt, most, _ in asked]
    bad = Completion([10**9], 5)  # no such token
    with held(run.generator, after=9):  # the first of them has some tokens by then
        run.generator.submit(good)
        wait_for(lambda: good[0].tokens)
        run.generator.submit([bad])
    run.wait([*good, bad])
    assert bad.reason == "error"
    assert [it.error for it in good] == [""] * 3
    assert [it.tokens for it in good] == [right for *_, right in asked]


def test_a_mad_model_is_told_and_the_lane_is_clean_again() -> None:
    torch.manual_seed(0)
    mad = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32).eval()
    ended: queue.Queue[Completion] = queue.Queue()
    generator = TransformersEngine(mad, 128, max_num_seqs=1, max_queue=4, max_batched_tokens=64, tell=lambda news: [ended.put(it) for it in news if it.reason])  # fmt: skip
    with torch.no_grad():
        mad.get_input_embeddings().weight[17] = torch.nan
    generator.submit([Completion([6, 17], 5), Completion([6, 18, 19], 5)])
    bad, good = ended.get(timeout=30), ended.get(timeout=30)
    assert (bad.reason, bad.error) == ("error", "the model's output is not a finite number")
    assert good.reason == "length"


@pytest.mark.parametrize("most", [AS_FLOATS, 0])
def test_bf16_attends_as_the_model_does_alone_and_in_company(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("engine.serve.llm.model_runner.AS_FLOATS", most)
    half = copy.deepcopy(model("llama")).bfloat16()
    prompts = [prompt for prompt, *_ in requests("llama")[:5]]
    run = Run(half, num_speculative_tokens=3)
    found = run.all(
        [Completion(prompt, 8, logprobs=0, sampling=SamplingParams(bias={EOS: -100.0})) for prompt in prompts]
    )
    for prompt, it in zip(prompts, found, strict=True):
        with torch.no_grad():
            right = model("llama")(torch.tensor([prompt + it.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for score, row in zip(it.scores, right, strict=True):
            assert score.logprob == pytest.approx(float(row[score.token]), abs=0.25)

"""Tokens a second of the generator against transformers' own ways to generate; one process, the same requests.

16 ragged clients: prompts of 8 to 64 tokens, 16 to 128 new ones, llama_5m with fresh weights in fp32, greedy. Every
contestant is counted by the tokens that were asked for. Peers: `generate` one after the other; one static batch of
`generate`, padded, until its longest ends; `generate_batch`, its continuous batching, its cache sized by hand. The upper
bound is the model's bare forward loop at a constant batch of 16, against the generator with 16 requests of the same
lengths. Predicted on two cores: 5x of one by one (a forward of 16 rows costs some three times that of one), 1.6x of the
static batch (its masks, its cache's concatenations and its rows that have ended), 1.0 of the bare loop (the lanes save
the concatenations; the step's own work, under half a millisecond, costs as much).
"""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from cluster.environment import quiet_environment
from engine.serve.generation import Completion, TransformersGenerator
from tests.bench.interleaved import interleave, show

CLIENTS = 16
BARE_PROMPT, BARE_NEW = 36, 96  # tokens of the bare loop
VOCABULARY = 4096

Requests = list[tuple[list[int], int]]


def make_model() -> Any:
    """Return llama_5m with fresh weights; it never ends by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8, intermediate_size=704,
        max_position_embeddings=512, tie_word_embeddings=True, vocab_size=VOCABULARY, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def ragged(dice: random.Random) -> Requests:
    """Return what the clients ask."""
    return [(tokens(dice, dice.randrange(8, 65)), dice.randrange(16, 129)) for _ in range(CLIENTS)]


def tokens(dice: random.Random, count: int) -> list[int]:
    """Return random tokens."""
    return [dice.randrange(6, VOCABULARY) for _ in range(count)]


def seconds(work: Callable[[], object]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Ours:
    """The generator."""

    def __init__(self, model: Any) -> None:
        self.ended: queue.Queue[Completion] = queue.Queue()
        self.generator = TransformersGenerator(
            model, 512, max_batch=CLIENTS, max_queue=256, step_tokens=256,
            tell=lambda news: [self.ended.put(it) for it in news if it.reason],
        )  # fmt: skip

    def __call__(self, requests: Requests) -> None:
        """Answer all."""
        self.generator.submit([Completion(prompt, new) for prompt, new in requests])
        for _ in requests:
            self.ended.get()


@torch.inference_mode()
def one_by_one(model: Any, requests: Requests) -> None:
    """`generate` for each request."""
    for prompt, new in requests:
        ids = torch.tensor([prompt])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)


@torch.inference_mode()
def static(model: Any, requests: Requests) -> None:
    """One batch of `generate`, padded on the left, until the longest request is done."""
    longest = max(len(prompt) for prompt, _ in requests)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in requests])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
    most = max(new for _, new in requests)
    model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)


def their_continuous(model: Any, requests: Requests) -> float:
    """transformers' continuous batching; each request ends at its own length. Returns the seconds without its start."""
    sized = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=256)
    generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation_config=generation, continuous_batching_config=sized) as manager:  # fmt: skip
        manager.add_request(requests[0][0], max_new_tokens=1)
        manager.get_result(timeout=60)  # it has started

        def work() -> None:
            for prompt, new in requests:
                manager.add_request(prompt, max_new_tokens=new)
            left = len(requests)
            while left:
                answer = manager.get_result(timeout=60)
                left -= answer is not None and answer.is_finished()

        return seconds(work)


@torch.inference_mode()
def bare(model: Any, prompts: list[list[int]], new: int) -> None:
    """The model's own forward, a cache of transformers', and the largest logit."""
    cache, ids = DynamicCache(config=model.config), torch.tensor(prompts)
    for _ in range(new):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)  # fmt: skip


def main() -> None:
    """Print the ratios."""
    quiet_environment()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model, peer = make_model(), make_model()  # ours gets another attention
    ours, dice = Ours(model), random.Random(0)

    def rate(answer: Callable[[Requests], float]) -> float:
        requests = ragged(random.Random(dice.randrange(2**30)))  # new ones: nothing is in a cache already
        return sum(new for _, new in requests) / answer(requests)

    found = interleave(
        {
            "generator": lambda: rate(lambda requests: seconds(lambda: ours(requests))),
            "generate one by one": lambda: rate(lambda requests: seconds(lambda: one_by_one(peer, requests))),
            "static batch of generate": lambda: rate(lambda requests: seconds(lambda: static(peer, requests))),
            "their continuous batching": lambda: rate(lambda requests: their_continuous(peer, requests)),
        }
    )
    targets = {"generate one by one": 4.0, "static batch of generate": 1.5, "their continuous batching": 4.0}
    show(found, "tokens/s", "generator", targets)

    def even() -> list[list[int]]:
        return [tokens(dice, BARE_PROMPT) for _ in range(CLIENTS)]

    written = CLIENTS * BARE_NEW
    found = interleave(
        {
            "generator, even": lambda: written / seconds(lambda: ours([(prompt, BARE_NEW) for prompt in even()])),
            "bare forward loop": lambda: written / seconds(lambda: bare(peer, even(), BARE_NEW)),
        }
    )
    show(found, "tokens/s", "generator, even", {"bare forward loop": 0.85})


if __name__ == "__main__":
    main()

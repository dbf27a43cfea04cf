"""Tokens a second of the generator against transformers' own ways to generate, each in a process of its own, in turn.

16 ragged clients: prompts of 8 to 64 tokens, 16 to 128 new ones, llama_5m with fresh weights in fp32, greedy. Every
contestant is counted by the tokens that were asked for. Peers: `generate` one after the other; one static batch of
`generate`, padded, until its longest ends; `generate_batch`, its continuous batching, its cache sized by hand. The upper
bound is the model's bare forward loop at a constant batch of 16, against the generator with 16 requests of the same
lengths. Predicted on two cores: 12x of one by one (some twenty operations of Python a layer take longer than the products of
one row, and ours are one call), 4x of the static batch, 2.5 of the bare loop, for the same reason and for its concatenations.

Why processes: libgomp gives every thread that runs products a team of its own, and where there are more threads than cores
in all these teams, none of them spins between two products: a step then takes up to twice as long, whoever runs it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from cluster.environment import quiet_environment
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.engine import Completion, TransformersEngine
from engine.serve.short_lived_thread import run_in_short_lived_thread
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


class Contestant:
    """A way to generate, in a process of its own; one works at a time."""

    def __init__(self, name: str) -> None:
        spawning = multiprocessing.get_context("spawn")
        self.asked, theirs = spawning.Pipe()
        spawning.Process(target=contest, args=(name, theirs), daemon=True).start()

    def __call__(self, requests: Requests) -> float:
        """Answer all; return the seconds."""
        self.asked.send(requests)
        took: float = self.asked.recv()
        return took


def contest(name: str, asked: Connection) -> None:
    """Be the process of a contestant."""
    quiet_environment()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model = run_in_short_lived_thread(make_model)
    answer = {
        "ours": Ours,
        "one by one": OneByOne,
        "static": Static,
        "continuous": Continuous,
        "bare": Bare,
    }[name](model)
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the bench has ended
        while True:
            asked.send(answer(asked.recv()))


class Ours:
    """The generator."""

    def __init__(self, model: Any) -> None:
        self.ended: queue.Queue[Completion] = queue.Queue()
        self.generator = TransformersEngine(
            run_in_short_lived_thread(lambda: pack_linear(model)), 512, max_num_seqs=CLIENTS, max_queue=256, max_batched_tokens=256,
            tell=lambda news: [self.ended.put(it) for it in news if it.reason],
        )  # fmt: skip

    def __call__(self, requests: Requests) -> float:
        """Answer all; return the seconds."""
        began = time.perf_counter()
        self.generator.submit([Completion(prompt, new) for prompt, new in requests])
        for _ in requests:
            self.ended.get()
        return time.perf_counter() - began


class OneByOne:
    """`generate` for each request."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, requests: Requests) -> float:
        """Answer all; return the seconds."""
        return seconds(lambda: [self.answer(prompt, new) for prompt, new in requests])

    def answer(self, prompt: list[int], new: int) -> None:
        """Answer one."""
        ids = torch.tensor([prompt])
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )


class Static:
    """One batch of `generate`, padded on the left, until the longest request is done."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, requests: Requests) -> float:
        """Answer all; return the seconds."""
        longest = max(len(prompt) for prompt, _ in requests)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in requests])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
        most = max(new for _, new in requests)
        return seconds(
            lambda: self.model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
        )


class Continuous:
    """transformers' continuous batching, its cache sized by hand; each request ends at its own length."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, requests: Requests) -> float:
        """Answer all; return the seconds without its start."""
        sized = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=256)
        generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self.model.continuous_batching_context_manager(generation_config=generation, continuous_batching_config=sized) as manager:  # fmt: skip
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


class Bare:
    """The model's own forward, a cache of transformers', and the largest logit; all requests are of one length."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, requests: Requests) -> float:
        """Answer all; return the seconds."""
        began = time.perf_counter()
        cache, ids = DynamicCache(config=self.model.config), torch.tensor([prompt for prompt, _ in requests])
        for _ in range(requests[0][1]):
            ids = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)  # fmt: skip
        return time.perf_counter() - began


def main() -> None:
    """Print the ratios."""
    dice = random.Random(0)
    names = {
        "generator": "ours", "generate one by one": "one by one", "static batch of generate": "static",
        "their continuous batching": "continuous",
    }  # fmt: skip
    contestants = {label: Contestant(name) for label, name in names.items()}

    def rate(contestant: Contestant, requests: Requests) -> float:
        return sum(new for _, new in requests) / contestant(requests)

    def one(contestant: Contestant) -> Callable[[], float]:  # new requests: nothing is in a cache already
        return lambda: rate(contestant, ragged(random.Random(dice.randrange(2**30))))

    found = interleave({label: one(contestant) for label, contestant in contestants.items()})
    targets = {"generate one by one": 4.0, "static batch of generate": 1.5, "their continuous batching": 4.0}
    show(found, "tokens/s", "generator", targets)

    def even(contestant: Contestant) -> Callable[[], float]:
        return lambda: rate(contestant, [(tokens(dice, BARE_PROMPT), BARE_NEW) for _ in range(CLIENTS)])

    bare = Contestant("bare")
    found = interleave({"generator, even": even(contestants["generator"]), "bare forward loop": even(bare)})
    show(found, "tokens/s", "generator, even", {"bare forward loop": 0.85})


if __name__ == "__main__":
    main()

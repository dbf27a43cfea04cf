"""Tokens a second of the engine against transformers' own ways to generate, each in a process of its own, in turn.

16 ragged requests: prompts of 8 to 64 tokens, 16 to 128 new ones, llama_5m with fresh weights in fp32, greedy. The
requested tokens are counted. Peers: `generate`, one request after another; one static batch of `generate`, padded, until
its longest request ends; `generate_batch`, its continuous batching, with its cache sized by hand. The upper bound is the
model's bare forward loop at a constant batch of 16, against the engine with 16 requests of the same lengths. Predicted on
two cores: 12x of one by one (some twenty operations of Python a layer take longer than the products of one row, and ours
are one call), 4x of the static batch, 2.5x of the bare loop, for the same reason and for its concatenations.

Each has a process, since libgomp gives every thread that runs products a team of its own, and while all teams together have
more threads than there are cores, none of them spins between two products: a step then takes up to twice as long.
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

from cluster.environment import set_default_environment
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.sequence import Sequence
from engine.serve.short_lived_thread import run_in_short_lived_thread
from tests.bench.interleaved import interleave, show

CLIENTS = 16
BARE_PROMPT_TOKENS, BARE_NEW_TOKENS = 36, 96  # tokens of the bare loop
VOCAB_SIZE = 4096

Requests = list[tuple[list[int], int]]


def make_model() -> Any:
    """Return llama_5m with fresh weights; it never generates an end token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8, intermediate_size=704,
        max_position_embeddings=512, tie_word_embeddings=True, vocab_size=VOCAB_SIZE, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def ragged_requests(rng: random.Random) -> Requests:
    """Return requests of random lengths."""
    return [(random_tokens(rng, rng.randrange(8, 65)), rng.randrange(16, 129)) for _ in range(CLIENTS)]


def random_tokens(rng: random.Random, count: int) -> list[int]:
    """Return random tokens."""
    return [rng.randrange(6, VOCAB_SIZE) for _ in range(count)]


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class EngineProcess:
    """A way to generate, in a process of its own; one runs at a time."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child_connection = context.Pipe()
        context.Process(target=run_process, args=(name, child_connection), daemon=True).start()

    def __call__(self, requests: Requests) -> float:
        """Process all requests; return the seconds."""
        self.connection.send(requests)
        elapsed_s: float = self.connection.recv()
        return elapsed_s


def run_process(name: str, connection: Connection) -> None:
    """Generate in this process: receive requests, send the seconds that they took."""
    set_default_environment()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model = run_in_short_lived_thread(make_model)
    generate = {
        "manta": Manta,
        "one by one": OneByOne,
        "static": Static,
        "continuous": Continuous,
        "bare": Bare,
    }[name](model)
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the benchmark has ended
        while True:
            connection.send(generate(connection.recv()))


class Manta:
    """TransformersEngine."""

    def __init__(self, model: Any) -> None:
        self.finished: queue.Queue[Sequence] = queue.Queue()
        self.engine = TransformersEngine(
            run_in_short_lived_thread(lambda: pack_linear(model)), 512, max_num_seqs=CLIENTS, max_queue=256, max_batched_tokens=256,
            on_output=lambda outputs: [self.finished.put(sequence) for sequence in outputs if sequence.finish_reason],
        )  # fmt: skip

    def __call__(self, requests: Requests) -> float:
        """Process all requests; return the seconds."""
        start = time.perf_counter()
        self.engine.submit([Sequence(prompt, new) for prompt, new in requests])
        for _ in requests:
            self.finished.get()
        return time.perf_counter() - start


class OneByOne:
    """`generate` for each request."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, requests: Requests) -> float:
        """Process all requests; return the seconds."""
        return seconds(lambda: [self.generate(prompt, new) for prompt, new in requests])

    def generate(self, prompt: list[int], new: int) -> None:
        """Process one request."""
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
        """Process all requests; return the seconds."""
        longest = max(len(prompt) for prompt, _ in requests)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in requests])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
        max_new_tokens = max(new for _, new in requests)
        return seconds(
            lambda: self.model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
            )
        )


class Continuous:
    """transformers' continuous batching, its cache sized by hand; each request ends at its own length."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, requests: Requests) -> float:
        """Process all requests; return the seconds, without its start."""
        cache_config = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=256)
        generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self.model.continuous_batching_context_manager(generation_config=generation, continuous_batching_config=cache_config) as manager:  # fmt: skip
            manager.add_request(requests[0][0], max_new_tokens=1)
            manager.get_result(timeout=60)  # wait until it has started

            def work() -> None:
                for prompt, new in requests:
                    manager.add_request(prompt, max_new_tokens=new)
                left = len(requests)
                while left:
                    output = manager.get_result(timeout=60)
                    left -= output is not None and output.is_finished()

            return seconds(work)


class Bare:
    """The model's own forward, a cache of transformers', and the largest logit; all requests are of one length."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, requests: Requests) -> float:
        """Process all requests; return the seconds."""
        start = time.perf_counter()
        cache, ids = DynamicCache(config=self.model.config), torch.tensor([prompt for prompt, _ in requests])
        for _ in range(requests[0][1]):
            ids = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)  # fmt: skip
        return time.perf_counter() - start


def main() -> None:
    """Print the ratios."""
    rng = random.Random(0)
    names = {
        "engine": "manta", "generate one by one": "one by one", "static batch of generate": "static",
        "their continuous batching": "continuous",
    }  # fmt: skip
    processes = {label: EngineProcess(name) for label, name in names.items()}

    def rate(process: EngineProcess, requests: Requests) -> float:
        return sum(new for _, new in requests) / process(requests)

    def with_new_requests(process: EngineProcess) -> Callable[[], float]:  # new requests: no prefix is cached
        return lambda: rate(process, ragged_requests(random.Random(rng.randrange(2**30))))

    rates = interleave({label: with_new_requests(process) for label, process in processes.items()})
    targets = {"generate one by one": 4.0, "static batch of generate": 1.5, "their continuous batching": 4.0}
    show(rates, "tokens/s", "engine", targets)

    def with_equal_requests(process: EngineProcess) -> Callable[[], float]:
        return lambda: rate(
            process, [(random_tokens(rng, BARE_PROMPT_TOKENS), BARE_NEW_TOKENS) for _ in range(CLIENTS)]
        )

    bare = EngineProcess("bare")
    rates = interleave(
        {
            "engine, equal lengths": with_equal_requests(processes["engine"]),
            "bare forward loop": with_equal_requests(bare),
        }
    )
    show(rates, "tokens/s", "engine, equal lengths", {"bare forward loop": 0.85})


if __name__ == "__main__":
    main()

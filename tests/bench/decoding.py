"""Tokens a second of the generator by the options that are to make it faster, for a Llama of 28 M parameters.

Weights in fp32, in bf16, and in 8 bits with bf16 activations; and a draft. 1 and 16 sequences, prompts of 36
tokens, 96 new ones, greedy. The weights are fresh. The target's later layers add little, and the draft is its first layer
with its table of tokens: how often it guesses right is made by construction, so the ratio is that at the share which is told,
and a trained pair has a share of its own. Predicted at 1 sequence, where a token waits for the weights to come from memory:
2x of fp32 in bf16 and 3x in 8 bits; at 16, where the products begin to count, less.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import random
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.environment import quiet_environment
from engine.models.int8 import quantize, weight_bytes
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.engine import Completion, TransformersEngine
from engine.serve.short_lived_thread import run_in_short_lived_thread
from tests.bench.interleaved import interleave, show

PROMPT, NEW = 36, 96  # tokens
VOCABULARY = 4096
SEQUENCES, REPEATS = (1, 16), 5
FAINT = 0.1  # what the target's later layers add, beside its first


def make_model(layers: int = 8) -> Any:
    """Return a Llama with fresh weights; it never ends by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408,
        max_position_embeddings=512, tie_word_embeddings=True, vocab_size=VOCABULARY, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def make_pair() -> tuple[Any, Any]:
    """Return a target and its draft."""
    target, draft = make_model(), make_model(1)
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight *= 30
            layer.mlp.down_proj.weight *= 30
        draft.model.layers[0].load_state_dict(target.model.layers[0].state_dict())
        draft.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        for layer in target.model.layers[1:]:
            layer.self_attn.o_proj.weight *= FAINT
            layer.mlp.down_proj.weight *= FAINT
    return target, draft


class Contestant:
    """A generator with some options, in a process of its own (see `generation`); one works at a time."""

    def __init__(self, name: str) -> None:
        spawning = multiprocessing.get_context("spawn")
        self.asked, theirs = spawning.Pipe()
        spawning.Process(target=contest, args=(name, theirs), daemon=True).start()
        self.bytes: int = self.asked.recv()  # of the weights
        self.right = 0.0  # share of its guesses so far

    def rate(self, sequences: int) -> float:
        """Answer so many at once; return the tokens a second."""
        self.asked.send(sequences)
        took, self.right = self.asked.recv()
        return sequences * NEW / float(took)


def contest(name: str, asked: Connection) -> None:
    """Be the process of a contestant."""
    quiet_environment()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model, draft = run_in_short_lived_thread(lambda: make(name))
    asked.send(weight_bytes(model))
    ended: queue.Queue[Completion] = queue.Queue()
    dice = random.Random(0)
    generator = TransformersEngine(
        run_in_short_lived_thread(lambda: pack_linear(model)), 512, max_num_seqs=16, max_queue=256, max_batched_tokens=256,
        num_speculative_tokens=6 if draft else 0, draft=draft, tell=lambda news: [ended.put(it) for it in news if it.reason],
    )  # fmt: skip
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the bench has ended
        while True:
            prompts = [[dice.randrange(6, VOCABULARY) for _ in range(PROMPT)] for _ in range(asked.recv())]
            began = time.perf_counter()
            generator.submit([Completion(prompt, NEW) for prompt in prompts])
            for _ in prompts:
                ended.get()
            asked.send((time.perf_counter() - began, generator.right_tokens / max(generator.guessed_tokens, 1)))


def make(name: str) -> tuple[Any, Any]:
    """Return a contestant's model, and its draft if it has one."""
    if name in ("with a draft", "without"):
        target, draft = make_pair()
        return target.bfloat16(), pack_linear(draft.bfloat16()) if name == "with a draft" else None
    model = make_model()
    if not name.startswith("fp32"):
        model = model.bfloat16()
    if name.startswith("int8"):
        quantize(model)
    return model, None


def main() -> None:
    """Print the ratios."""
    names = ("fp32", "bf16", "int8", "with a draft", "without")
    contestants = {name: Contestant(name) for name in names}
    print("weights: " + ", ".join(f"{name} {contestants[name].bytes / 2**20:.1f} MiB" for name in names[:3]))
    for sequences in SEQUENCES:
        print(f"-- {sequences} at once")
        setting = f"{sequences} sequences"
        found = interleave({name: functools.partial(it.rate, sequences) for name, it in contestants.items()}, REPEATS)
        show(
            {name: found[name] for name in ("fp32", "bf16", "int8")},
            "tokens/s",
            "int8",
            {"fp32": 1.0, "bf16": 1.0},
            setting,
        )
        right = f"{100 * contestants['with a draft'].right:.0f} % of the guesses right"
        print(right)
        show(
            {name: found[name] for name in ("with a draft", "without")},
            "tokens/s",
            "with a draft",
            {"without": 1.0},
            f"{setting}, {right}",
        )


if __name__ == "__main__":
    main()

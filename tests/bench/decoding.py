"""Tokens a second of the generator by the options that are to make it faster; one process, a Llama of 28 M parameters.

Weights in fp32, in bf16, and in 8 bits with bf16 activations; torch compile; and a draft. 1 and 16 sequences, prompts of 36
tokens, 96 new ones, greedy. The weights are fresh. The target's later layers add little, and the draft is its first layer
with its table of tokens: how often it guesses right is made by construction, so the ratio is that at the share which is told,
and a trained pair has a share of its own. Predicted at 1 sequence, where a token waits for the weights to come from memory:
2x of fp32 in bf16 and 3x in 8 bits; at 16, where the products begin to count, less.
"""

from __future__ import annotations

import copy
import functools
import os
import queue
import random
import time
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.environment import quiet_environment
from engine.models.int8 import quantize, weight_bytes
from engine.serve.generation import Completion, TransformersGenerator
from tests.bench.interleaved import interleave, show

PROMPT, NEW = 36, 96  # tokens
VOCABULARY = 4096
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
    """A generator with some options."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.ended: queue.Queue[Completion] = queue.Queue()
        self.generator = TransformersGenerator(
            model, 512, max_batch=16, max_queue=256, step_tokens=256, **options,
            tell=lambda news: [self.ended.put(it) for it in news if it.reason],
        )  # fmt: skip
        self.dice = random.Random(0)

    def rate(self, sequences: int) -> float:
        """Answer so many at once; return the tokens a second."""
        prompts = [[self.dice.randrange(6, VOCABULARY) for _ in range(PROMPT)] for _ in range(sequences)]
        began = time.perf_counter()
        self.generator.submit([Completion(prompt, NEW) for prompt in prompts])
        for _ in prompts:
            self.ended.get()
        return sequences * NEW / (time.perf_counter() - began)

    @property
    def right(self) -> float:
        """The share of the guesses that was right."""
        return self.generator.right_tokens / max(self.generator.guessed_tokens, 1)


def in_8_bits(model: Any) -> Any:
    """Return a model with weights of 8 bits."""
    quantize(model)
    return model


def main() -> None:
    """Print the ratios."""
    quiet_environment()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    models = {"fp32": make_model(), "bf16": make_model().bfloat16(), "int8": in_8_bits(make_model().bfloat16())}
    print("weights: " + ", ".join(f"{name} {weight_bytes(model) / 2**20:.1f} MiB" for name, model in models.items()))
    contestants = {name: Contestant(model) for name, model in models.items()}
    contestants["bf16, compiled"] = Contestant(copy.deepcopy(models["bf16"]), compiled=True)
    contestants["int8, compiled"] = Contestant(copy.deepcopy(models["int8"]), compiled=True)
    for sequences in (1, 16):
        print(f"-- {sequences} at once")
        found = interleave({name: functools.partial(it.rate, sequences) for name, it in contestants.items()})
        show(found, "tokens/s", "int8", {"fp32": 1.0, "bf16": 1.0}, setting=f"{sequences} sequences")
        show({name: found[name] for name in ("bf16, compiled", "bf16")}, "tokens/s", "bf16, compiled", {"bf16": 1.0}, setting=f"{sequences} sequences")  # fmt: skip
    target, draft = make_pair()
    pair = {
        "with a draft": Contestant(target.bfloat16(), speculate=6, draft=draft.bfloat16()),
        "without": Contestant(copy.deepcopy(target)),
    }
    for sequences in (1, 16):
        print(f"-- {sequences} at once")
        found = interleave({name: functools.partial(it.rate, sequences) for name, it in pair.items()})
        right = f"{100 * pair['with a draft'].right:.0f} % of the guesses right"
        print(right)
        show(found, "tokens/s", "with a draft", {"without": 1.0}, setting=f"{sequences} sequences, {right}")


if __name__ == "__main__":
    main()

"""Small models of several families, requests with the tokens that `model.generate` gives, and an engine to wait for."""

from __future__ import annotations

import functools
import queue
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.sequence import Sequence

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


class Request(NamedTuple):
    """A prompt and what follows it, greedily."""

    prompt: list[int]
    max_tokens: int
    expected: list[int]  # tokens of `model.generate` without the end token

    def sequence(self, **fields: Any) -> Sequence:
        """Return a new sequence for the engine."""
        return Sequence(self.prompt, self.max_tokens, **fields)


@functools.cache
def model(family: str) -> nn.Module:
    """Return a family's model with fresh weights."""
    torch.manual_seed(0)
    fresh = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in fresh.parameters():
            if p.ndim > 1:
                p.mul_(8)  # large enough for outputs to differ
    return fresh


def generate(own_model: nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    """Return the tokens of `model.generate`, greedily, without the end token."""
    ids = torch.tensor([prompt])
    output = own_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)  # type: ignore[operator]  # fmt: skip
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] == EOS else tokens


def make_requests(own_model: nn.Module) -> list[Request]:
    """Return ragged requests, two of which have a prefix in common."""
    rng = random.Random(0)
    prompts = [([rng.randrange(6, 300) for _ in range(rng.randrange(1, 50))], rng.randrange(1, 60)) for _ in range(12)]
    prompts += [([*prompts[3][0], 7, 8], 20), ([*prompts[3][0], 7, 9], 20)]
    return [Request(prompt, max_tokens, generate(own_model, prompt, max_tokens)) for prompt, max_tokens in prompts]


@functools.cache
def requests(family: str) -> list[Request]:
    """Return the requests for a family's model."""
    return make_requests(model(family))


def tokens_of(sequences: list[Sequence]) -> list[list[int]]:
    """Return each sequence's generated tokens."""
    return [sequence.tokens for sequence in sequences]


class EngineHarness:
    """An engine, of a family's model or a given one, whose finished sequences can be waited for."""

    def __init__(self, own_model: str | nn.Module, **options: Any) -> None:
        self.finished: queue.Queue[Sequence] = queue.Queue()
        sizes: dict[str, Any] = {"max_num_seqs": 5, "max_queue": 100, "max_batched_tokens": 24} | options
        self.engine = TransformersEngine(
            model(own_model) if isinstance(own_model, str) else own_model, 128, **sizes, on_output=self._put_finished
        )

    def _put_finished(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.finish_reason:
                self.finished.put(sequence)

    def generate(self, sequences: list[Sequence]) -> list[Sequence]:
        """Submit sequences, and return them once all are finished."""
        self.engine.submit(sequences)
        return self.wait(sequences)

    def wait(self, sequences: list[Sequence]) -> list[Sequence]:
        """Wait until as many sequences are finished."""
        for _ in sequences:
            self.finished.get(timeout=60)
        return sequences

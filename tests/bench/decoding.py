"""Tokens a second of the engine by the options that make it faster, for a Llama of 28 M parameters.

Weights in fp32, in bf16, and in 8 bits with bf16 activations; and a draft model. 1 and 16 sequences, prompts of 36
tokens, 96 new ones, greedy. The weights are fresh. The target's later layers add little, and the draft model is its first layer
with its embeddings: the acceptance rate is a result of this construction, so the ratio is that at the printed rate, and a
trained pair has a rate of its own. Predicted at 1 sequence, where a token is bound by the bandwidth for the weights: 2x of
fp32 in bf16 and 3x in 8 bits; less at 16, where the products begin to count.
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

from cluster.environment import set_default_environment
from engine.models.int8 import quantize, weight_bytes
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.engine import TransformersEngine
from engine.serve.llm.sequence import Sequence
from engine.serve.short_lived_thread import run_in_short_lived_thread
from tests.bench.interleaved import interleave, show

PROMPT_TOKENS, NEW_TOKENS = 36, 96  # tokens
VOCAB_SIZE = 4096
BATCH_SIZES, REPEATS = (1, 16), 5
LATER_LAYER_SCALE = 0.1  # weight of what the target's later layers add


def make_model(layers: int = 8) -> Any:
    """Return a Llama with fresh weights; it never generates an end token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408,
        max_position_embeddings=512, tie_word_embeddings=True, vocab_size=VOCAB_SIZE, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def make_pair() -> tuple[Any, Any]:
    """Return a target model and its draft model."""
    target, draft = make_model(), make_model(1)
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight *= 30
            layer.mlp.down_proj.weight *= 30
        draft.model.layers[0].load_state_dict(target.model.layers[0].state_dict())
        draft.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        for layer in target.model.layers[1:]:
            layer.self_attn.o_proj.weight *= LATER_LAYER_SCALE
            layer.mlp.down_proj.weight *= LATER_LAYER_SCALE
    return target, draft


class EngineProcess:
    """An engine with some options, in a process of its own (see `generation`); one runs at a time."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child_connection = context.Pipe()
        context.Process(target=run_process, args=(name, child_connection), daemon=True).start()
        self.num_bytes: int = self.connection.recv()  # of the weights
        self.accepted_share = 0.0  # of the draft tokens so far

    def rate(self, batch_size: int) -> float:
        """Generate a batch; return the tokens a second."""
        self.connection.send(batch_size)
        elapsed_s, self.accepted_share = self.connection.recv()
        return batch_size * NEW_TOKENS / float(elapsed_s)


def run_process(name: str, connection: Connection) -> None:
    """Run an engine in this process: receive batch sizes, send the seconds of each batch, and the share of accepted draft tokens."""
    set_default_environment()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model, draft = run_in_short_lived_thread(lambda: make_models(name))
    connection.send(weight_bytes(model))
    finished: queue.Queue[Sequence] = queue.Queue()
    rng = random.Random(0)
    engine = TransformersEngine(
        run_in_short_lived_thread(lambda: pack_linear(model)), 512, max_num_seqs=16, max_queue=256, max_batched_tokens=256,
        num_speculative_tokens=6 if draft else 0, draft_model=draft,
        on_output=lambda outputs: [finished.put(sequence) for sequence in outputs if sequence.finish_reason],
    )  # fmt: skip
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the benchmark has ended
        while True:
            prompts = [[rng.randrange(6, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(connection.recv())]
            start = time.perf_counter()
            engine.submit([Sequence(prompt, NEW_TOKENS) for prompt in prompts])
            for _ in prompts:
                finished.get()
            connection.send((time.perf_counter() - start, engine.num_accepted_tokens / max(engine.num_draft_tokens, 1)))


def make_models(name: str) -> tuple[Any, Any]:
    """Return the model of an option's name, and its draft model if it has one."""
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
    processes = {name: EngineProcess(name) for name in names}
    print("weights: " + ", ".join(f"{name} {processes[name].num_bytes / 2**20:.1f} MiB" for name in names[:3]))
    for batch_size in BATCH_SIZES:
        print(f"-- {batch_size} at once")
        setting = f"{batch_size} sequences"
        rates = interleave(
            {name: functools.partial(process.rate, batch_size) for name, process in processes.items()}, REPEATS
        )
        show(
            {name: rates[name] for name in ("fp32", "bf16", "int8")},
            "tokens/s",
            "int8",
            {"fp32": 1.0, "bf16": 1.0},
            setting,
        )
        accepted = f"{100 * processes['with a draft'].accepted_share:.0f} % of the draft tokens accepted"
        print(accepted)
        show(
            {name: rates[name] for name in ("with a draft", "without")},
            "tokens/s",
            "with a draft",
            {"without": 1.0},
            f"{setting}, {accepted}",
        )


if __name__ == "__main__":
    main()

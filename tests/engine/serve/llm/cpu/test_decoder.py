"""A model as one operation: the logits of its own modules, whatever it is made of, and no other model taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.models.int8 import quantize
from engine.serve.llm.cpu import kernels
from engine.serve.llm.cpu.decoder import make_decoder
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import BatchedRunner, ScheduledSequence

pytestmark = pytest.mark.skipif(not kernels.load(), reason="no compiler for C++")
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
ALIKE = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 24, "rope_parameters": LONG}),
    ("llama", {"head_dim": 32, "num_key_value_heads": 1, "rope_parameters": YARN}),
    ("mistral", {"head_dim": 16, "sliding_window": 64}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
]
OTHERS = [
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("granite", {"residual_multiplier": 0.5}),  # has Llama's names
    ("gemma", {"head_dim": 16}),  # so has this
    ("olmo2", {}),
]
STEPS = (
    [
        ScheduledSequence(0, 0, list(range(3, 40)), 37),
        ScheduledSequence(2, 0, [7, 8, 9], 3),
        ScheduledSequence(3, 0, [5], 1),
    ],
    [
        ScheduledSequence(0, 37, [11], 1),
        ScheduledSequence(1, 0, list(range(9, 27)), 0),
        ScheduledSequence(2, 3, [4, 6], 2),
        ScheduledSequence(3, 1, [12], 1),
    ],
    [
        ScheduledSequence(0, 38, [2], 1),
        ScheduledSequence(1, 18, list(range(30, 50)), 20),
        ScheduledSequence(3, 2, [40], 1),
    ],
)


def make(kind: str, options: dict[str, Any]) -> nn.Module:
    """Return a model whose sizes are no multiples of what is worked on together, with all its weights drawn."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 60 if "head_dim" in options else 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 101, "vocab_size": 301, "max_position_embeddings": 128,
    }  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model


def harness(model: nn.Module, steps: Any) -> tuple[BatchedRunner, list[torch.Tensor]]:
    forward = BatchedRunner(model, LoraAdapters(model))
    forward.shape(4, 64)
    with torch.inference_mode():
        return forward, [forward.run(parts) for parts in steps]


@pytest.mark.parametrize(("kind", "options"), ALIKE, ids=str)
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_it_is_what_the_modules_give(
    kind: str, options: dict[str, Any], dtype: torch.dtype, off: float, in_8_bits: bool
) -> None:
    models = [make(kind, options).to(dtype) for _ in range(2)]
    if in_8_bits:
        for model in models:
            quantize(model)
    by_modules, right = harness(models[0], STEPS)
    forward, found = harness(pack_linear(models[1]), STEPS)
    assert by_modules.decoder is None
    assert forward.decoder is not None
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=off * float(theirs.abs().max()))


@pytest.mark.parametrize(("kind", "options"), OTHERS, ids=str)
def test_no_other_model_is_taken_for_one(kind: str, options: dict[str, Any]) -> None:
    _, right = harness(make(kind, options), STEPS)
    forward, found = harness(pack_linear(make(kind, options)), STEPS)
    assert forward.decoder is None
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_one_without_llamas_parts_is_left_alone() -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    options = sizes | {"intermediate_size": 32, "layer_types": ["conv", "full_attention"], "hidden_act": "silu"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **options))
    assert not hasattr(model.model.layers[0], "self_attn")
    assert make_decoder(pack_linear(model)) is None

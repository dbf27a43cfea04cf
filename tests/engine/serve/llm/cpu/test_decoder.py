"""A model as one operation: the logits of its own modules, and no use of it for a model of another structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.models.int8 import quantize
from engine.serve.llm.cpu import kernels
from engine.serve.llm.cpu.decoder import make_decoder
from engine.serve.llm.cpu.linear import is_packable, pack_linear
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import BatchedRunner, ScheduledSequence

pytestmark = pytest.mark.skipif(not kernels.load(), reason="no compiler for C++")
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
SUPPORTED = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 24, "rope_parameters": LONG}),
    ("llama", {"head_dim": 32, "num_key_value_heads": 1, "rope_parameters": YARN}),
    ("mistral", {"head_dim": 16, "sliding_window": 64}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
]
UNSUPPORTED = [
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("granite", {"residual_multiplier": 0.5}),  # has the names of Llama's modules
    ("gemma", {"head_dim": 16}),  # so has this one
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


def make_model(family: str, options: dict[str, Any]) -> nn.Module:
    """Return a model with random weights, whose sizes are no multiples of the kernels' block sizes."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 60 if "head_dim" in options else 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 101, "vocab_size": 301, "max_position_embeddings": 128,
    }  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model


def run_steps(model: nn.Module, steps: Any) -> tuple[BatchedRunner, list[torch.Tensor]]:
    runner = BatchedRunner(model, LoraAdapters(model))
    runner.reshape(4, 64)
    with torch.inference_mode():
        return runner, [runner.run(batch) for batch in steps]


@pytest.mark.parametrize(("family", "options"), SUPPORTED, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("is_int8", [False, True])
def test_logits_equal_those_of_the_modules(
    family: str, options: dict[str, Any], dtype: torch.dtype, tolerance: float, is_int8: bool
) -> None:
    models = [make_model(family, options).to(dtype) for _ in range(2)]
    if is_int8:
        for model in models:
            quantize(model)
    by_modules, expected = run_steps(models[0], STEPS)
    runner, results = run_steps(pack_linear(models[1]), STEPS)
    assert by_modules.decoder is None
    assert (runner.decoder is not None) == (is_int8 or is_packable(dtype))
    for logits, own_logits in zip(results, expected, strict=True):
        assert logits.dtype == own_logits.dtype
        torch.testing.assert_close(logits, own_logits, rtol=0, atol=tolerance * float(own_logits.abs().max()))


@pytest.mark.parametrize(("family", "options"), UNSUPPORTED, ids=str)
def test_other_structures_run_by_their_modules(family: str, options: dict[str, Any]) -> None:
    _, expected = run_steps(make_model(family, options), STEPS)
    runner, results = run_steps(pack_linear(make_model(family, options)), STEPS)
    assert runner.decoder is None
    for logits, own_logits in zip(results, expected, strict=True):
        torch.testing.assert_close(logits, own_logits, rtol=0, atol=2e-5 * float(own_logits.abs().max()))


def test_model_without_llamas_modules_gets_no_decoder() -> None:
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

"""Int8 weights: their error, their memory, and which layers are quantized."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.models.int8 import (
    KERNEL_MAX_ROWS,
    Int8Embedding,
    Int8Linear,
    is_quantized,
    quantize,
    quantize_weight,
    weight_bytes,
)

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, hidden_size=64, intermediate_size=160, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True),
    "untied": transformers.LlamaConfig(**SIZES, hidden_size=64, intermediate_size=160, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(**SIZES, n_embd=64, n_positions=64),
    "bloom": transformers.BloomConfig(**SIZES, hidden_size=64),
    "odd": transformers.LlamaConfig(**SIZES, hidden_size=40, intermediate_size=52, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True),
}  # fmt: skip


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)  # so that the logits of different tokens differ
    return model


def quantized_copy(model: nn.Module) -> nn.Module:
    quantized = copy.deepcopy(model)
    quantize(quantized)
    return quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3] = 0
    matrix, scale = quantize_weight(weight)
    assert (matrix.dtype, scale.dtype) == (torch.int8, dtype)
    error = (matrix.float() * scale.float()[:, None] - weight.float()).abs().amax(1)
    # In bf16 the scale itself has an error of up to 2^-9, so that the largest weight may be over 127 steps.
    assert (error <= scale.float() * (0.5 if dtype == torch.float32 else 0.75) + 1e-7).all()
    assert error[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 52, 7])
def test_layer_equals_the_product_with_dequantized_weights_for_any_number_of_rows(
    dtype: torch.dtype, inputs: int
) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(*quantize_weight(torch.randn(37, inputs).to(dtype)), torch.randn(37).to(dtype))
    weights = layer.weight.double() * layer.scale.double()[:, None]
    for rows in (1, 3, KERNEL_MAX_ROWS, KERNEL_MAX_ROWS + 1, 100):
        layer_inputs = torch.randn(1, rows, inputs).to(dtype)
        expected = layer_inputs.double() @ weights.T + layer.bias.double()  # type: ignore[operator]
        actual = layer(layer_inputs)
        assert (actual.shape, actual.dtype) == (expected.shape, dtype)
        assert (actual.double() - expected).abs().max() < (
            1e-4 if dtype == torch.float32 else 0.02
        ) * expected.abs().max()


def test_row_output_does_not_depend_on_the_batch_size_within_the_kernel_limit() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(*quantize_weight(torch.randn(70, 96).bfloat16()), None)
    layer_inputs = torch.randn(KERNEL_MAX_ROWS, 96).bfloat16()
    batched = layer(layer_inputs)
    for rows in (1, 2, 5):
        assert torch.equal(torch.cat([layer(part) for part in layer_inputs.split(rows)]), batched)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_close_and_weights_take_a_quarter_of_the_memory(kind: str) -> None:
    model = make_model(kind)
    quantized = quantized_copy(model)
    ids = torch.randint(3, 500, (4, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, actual = model(ids).logits, quantized(ids).logits
    assert is_quantized(quantized)
    assert not is_quantized(model)
    assert not any(type(layer) in (nn.Linear, Conv1D) for layer in quantized.modules())
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05
    logprobs = [logits.log_softmax(-1).gather(2, ids[..., None]) for logits in (expected, actual)]
    assert (logprobs[1] - logprobs[0]).abs().mean() < 0.1
    share = weight_bytes(quantized) / weight_bytes(model)
    assert (
        0.25 < share < 0.3
    )  # norms, biases, positions and scales are not int8, and large relative to such small layers


def test_tied_weights_stay_tied() -> None:
    tied, untied = quantized_copy(make_model("llama")), quantized_copy(make_model("untied"))
    table, head = tied.get_input_embeddings(), tied.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(table, Int8Embedding)
    assert isinstance(head, Int8Linear)
    assert table.weight.data_ptr() == head.weight.data_ptr()
    assert table.scale.data_ptr() == head.scale.data_ptr()
    assert untied.get_input_embeddings().weight.data_ptr() != untied.get_output_embeddings().weight.data_ptr()  # type: ignore[operator]
    ids = torch.tensor([[3, 9, 499]])
    assert torch.equal(table(ids), table.weight[ids].float() * table.scale[ids][..., None])


def test_layer_with_two_paths_is_quantized_once() -> None:
    class SharedLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(32, 32)
            self.other = self.one

        def get_input_embeddings(self) -> None:
            return None

    model = SharedLayer()
    quantize(model)
    assert isinstance(model.one, Int8Linear)
    assert model.one is model.other  # type: ignore[comparison-overlap]


def test_bf16_model_takes_half_the_memory() -> None:
    model = make_model("llama", torch.bfloat16)
    quantized = quantized_copy(model)
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, actual = model(ids).logits.float(), quantized(ids).logits.float()
    assert quantized(ids).logits.dtype == torch.bfloat16
    assert (actual - expected).norm() / expected.norm() < 0.06
    assert 0.5 < weight_bytes(quantized) / weight_bytes(model) < 0.54

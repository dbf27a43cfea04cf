"""Weights of 8 bits: how near they are, what they take, and which layers get them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.models.int8 import KERNEL_MAX_ROWS, Int8Embedding, Int8Linear, is_quantized, quantize, quantize_weight, weight_bytes

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, hidden_size=64, intermediate_size=160, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True),
    "untied": transformers.LlamaConfig(**SIZES, hidden_size=64, intermediate_size=160, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(**SIZES, n_embd=64, n_positions=64),
    "bloom": transformers.BloomConfig(**SIZES, hidden_size=64),
    "odd": transformers.LlamaConfig(**SIZES, hidden_size=40, intermediate_size=52, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True),
}  # fmt: skip


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)  # so that the answers differ
    return model


def in_8_bits(model: nn.Module) -> nn.Module:
    smaller = copy.deepcopy(model)
    quantize(smaller)
    return smaller


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_step(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3] = 0
    matrix, scale = quantize_weight(weight)
    assert (matrix.dtype, scale.dtype) == (torch.int8, dtype)
    off = (matrix.float() * scale.float()[:, None] - weight.float()).abs().amax(1)
    # In bf16 the scale is itself off by up to 2^-9, so that the largest weight may be over 127 steps.
    assert (off <= scale.float() * (0.5 if dtype == torch.float32 else 0.75) + 1e-7).all()
    assert off[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 52, 7])
def test_a_layer_is_the_product_with_its_rounded_weights_however_many_rows(dtype: torch.dtype, inputs: int) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(*quantize_weight(torch.randn(37, inputs).to(dtype)), torch.randn(37).to(dtype))
    weights = layer.weight.double() * layer.scale.double()[:, None]
    for rows in (1, 3, KERNEL_MAX_ROWS, KERNEL_MAX_ROWS + 1, 100):
        given = torch.randn(1, rows, inputs).to(dtype)
        right = given.double() @ weights.T + layer.bias.double()  # type: ignore[operator]
        found = layer(given)
        assert (found.shape, found.dtype) == (right.shape, dtype)
        assert (found.double() - right).abs().max() < (1e-4 if dtype == torch.float32 else 0.02) * right.abs().max()


def test_a_row_gives_the_same_bits_in_any_company_of_a_few() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(*quantize_weight(torch.randn(70, 96).bfloat16()), None)
    given = torch.randn(KERNEL_MAX_ROWS, 96).bfloat16()
    together = layer(given)
    for rows in (1, 2, 5):
        assert torch.equal(torch.cat([layer(part) for part in given.split(rows)]), together)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_near_and_the_weights_take_a_quarter(kind: str) -> None:
    model = made(kind)
    smaller = in_8_bits(model)
    ids = torch.randint(3, 500, (4, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        right, found = model(ids).logits, smaller(ids).logits
    assert is_quantized(smaller)
    assert not is_quantized(model)
    assert not any(type(layer) in (nn.Linear, Conv1D) for layer in smaller.modules())
    assert 0 < (found - right).norm() / right.norm() < 0.05
    both = [logits.log_softmax(-1).gather(2, ids[..., None]) for logits in (right, found)]
    assert (both[1] - both[0]).abs().mean() < 0.1
    share = weight_bytes(smaller) / weight_bytes(model)
    assert 0.25 < share < 0.3  # norms, biases, positions and scales stay; here they are large beside so small layers


def test_what_was_one_matrix_stays_one() -> None:
    tied, untied = in_8_bits(made("llama")), in_8_bits(made("untied"))
    table, head = tied.get_input_embeddings(), tied.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(table, Int8Embedding)
    assert isinstance(head, Int8Linear)
    assert table.weight.data_ptr() == head.weight.data_ptr()
    assert table.scale.data_ptr() == head.scale.data_ptr()
    assert untied.get_input_embeddings().weight.data_ptr() != untied.get_output_embeddings().weight.data_ptr()  # type: ignore[operator]
    ids = torch.tensor([[3, 9, 499]])
    assert torch.equal(table(ids), table.weight[ids].float() * table.scale[ids][..., None])


def test_a_layer_that_stands_in_two_places_is_made_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(32, 32)
            self.other = self.one

        def get_input_embeddings(self) -> None:
            return None

    twice = Twice()
    quantize(twice)
    assert isinstance(twice.one, Int8Linear)
    assert twice.one is twice.other  # type: ignore[comparison-overlap]


def test_in_bf16_they_are_half() -> None:
    model = made("llama", torch.bfloat16)
    smaller = in_8_bits(model)
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        right, found = model(ids).logits.float(), smaller(ids).logits.float()
    assert smaller(ids).logits.dtype == torch.bfloat16
    assert (found - right).norm() / right.norm() < 0.06
    assert 0.5 < weight_bytes(smaller) / weight_bytes(model) < 0.54

"""Packed linear layers: the model's own outputs, no second copy of a large weight, adapters and tied embeddings unharmed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from engine.serve.llm.cpu import kernels
from engine.serve.llm.cpu.linear import SMALL_BYTES, is_packable, pack_linear


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16384, vocab_size=300,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_model_has_the_same_logits(make: object, dtype: torch.dtype) -> None:
    plain = make().to(dtype)  # type: ignore[operator]
    packed = pack_linear(copy.deepcopy(plain))
    for rows, length in ((1, 1), (1, 7), (3, 5), (16, 1), (40, 9)):
        ids = torch.arange(rows * length).reshape(rows, length) % 300
        tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.02}
        torch.testing.assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_small_and_tied_weights_are_kept_unpacked(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    embedding = model.get_input_embeddings().weight.clone()  # type: ignore[operator]
    pack_linear(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    has_kernels = dtype == torch.float32 and kernels.load()
    packed = {name for name, layer in layers.items() if has_kernels or layer.weight.nbytes > SMALL_BYTES} - {"lm_head"}
    packed = packed if is_packable(dtype) else set()
    assert len(packed) == (14 if has_kernels else 6 if is_packable(dtype) else 0)
    assert {name for name, layer in layers.items() if layer.weight.is_meta} == packed
    assert torch.equal(model.get_input_embeddings().weight, embedding)  # type: ignore[operator]
    assert layers["lm_head"].weight is model.get_input_embeddings().weight  # type: ignore[operator]

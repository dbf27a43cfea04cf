"""Blockwise attention equals sdpa in outputs and gradients, with masks and when compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.models import attention
from engine.models.attention import ATTENTION_NAME, blockwise_attention, enable_blockwise_attention

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "causal": None,
    "bidirectional": None,
    "padded": (3, 1, 1, 50),
    "square": (3, 1, 50, 50),
    "by head": (3, 4, 50, 50),
}


def sdpa_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return the output of sdpa, [B, L, H, D], in fp32."""
    parts = (part.float() for part in (query, key, value))
    mask = None if mask is None else mask.float()
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal).transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "block"), [(256, 2**20), (16, 2**20), (16, 4 * 16 * 50)])
def test_outputs_and_gradients_equal_sdpa(kind: str, queries: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", queries)
    monkeypatch.setattr(attention, "SCORES_PER_BLOCK", block)
    torch.manual_seed(0)
    parts = [torch.randn(3, 50, 4, 16).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    shape = KINDS[kind]
    mask = None if shape is None else torch.where(torch.rand(shape) < 0.3, -1e9, torch.randn(shape)).bfloat16()
    ours = blockwise_attention(*parts, mask, kind == "causal", 0.25)
    theirs = sdpa_reference(*parts, mask, kind == "causal")
    grad_output = torch.randn_like(theirs)
    torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=2e-2)
    actual = torch.autograd.grad(ours, parts, grad_output.bfloat16())
    expected = torch.autograd.grad(theirs, parts, grad_output)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_fp32_differs_by_rounding_only() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 4, 50, 16, requires_grad=True) for _ in range(3)]
    ours, theirs = blockwise_attention(*parts, None, True, 0.25), sdpa_reference(*parts, None, True)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for one, other in zip(*(torch.autograd.grad(o.square().sum(), parts) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def loss_and_gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["grouped", "documents", "bert"])
def test_model_has_the_same_loss_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (4, 40))
    inputs = {"input_ids": tokens, "labels": tokens}
    if kind == "bert":
        model = AutoModelForMaskedLM.from_config(BertConfig(**SMALL), attn_implementation="sdpa")
        inputs["attention_mask"] = (torch.arange(40) < torch.tensor([[40], [30], [20], [10]])).long()
    else:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(num_key_value_heads=2, **SMALL), attn_implementation="sdpa"
        )
        if kind == "documents":
            inputs["position_ids"] = torch.cat([torch.arange(25), torch.arange(15)]).expand(4, 40)
    model = model.bfloat16().eval()  # without dropout, which falls back to sdpa
    other = copy.deepcopy(model)
    enable_blockwise_attention(other)
    assert other.config._attn_implementation == ATTENTION_NAME
    calls: list[int] = []
    monkeypatch.setattr(attention, "blockwise_attention", lambda *a: calls.append(1) or blockwise_attention(*a))
    (loss, expected), (ours, actual) = loss_and_gradients(model, inputs), loss_and_gradients(other, inputs)
    assert len(calls) == 2
    assert float(ours) == pytest.approx(float(loss), abs=0.02)
    for name, gradient in expected.items():
        if float(gradient.norm()) > 1e-3:  # a key's bias has no effect: its gradient is rounding error
            assert (actual[name] - gradient).norm() < 0.03 * gradient.norm(), name


def test_dropout_and_fp32_fall_back_to_sdpa() -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    parts = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    ours, _ = attention.blockwise_attention_forward(module, *parts, None, is_causal=True)
    theirs, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *parts, None, is_causal=True)
    assert torch.equal(ours, theirs)
    halves = [part.bfloat16() for part in parts]
    torch.manual_seed(1)
    ours, _ = attention.blockwise_attention_forward(module, *halves, None, dropout=0.5)
    torch.manual_seed(1)
    theirs, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *halves, None, dropout=0.5)
    assert torch.equal(ours, theirs)


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 4, 32, 16).bfloat16().requires_grad_() for _ in range(3)]

    def squared(*parts: Tensor) -> Tensor:
        return (
            attention.blockwise_attention_forward(torch.nn.Module(), *parts, None, is_causal=True)[0]
            .float()
            .square()
            .sum()
        )

    compiled = torch.compile(squared, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(torch.autograd.grad(f(*parts), parts) for f in (squared, compiled)), strict=True):
        assert torch.equal(one, other)

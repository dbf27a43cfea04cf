"""Blockwise attention on a CPU in bf16, built from matrix products over blocks that fit into the cache.

torch's own flash attention on a CPU multiplies small tiles, at a tenth of the rate at which a processor with bf16 units
multiplies large matrices. Here the scores of a block of queries are one batched product, rounded to bf16 as in transformers'
eager attention; the backward pass recomputes them, so that memory use is that of FlashAttention (Dao et al. 2022,
https://arxiv.org/abs/2205.14135). Everything else (a GPU, another precision, dropout, a bias) falls back to sdpa.

As in that paper: scores S = scale Q K^T + mask, probabilities P = softmax(S), output O = P V, and dX is the gradient of X.
Shapes: B batch, H query heads, K key and value heads, L queries, M keys, D head dimension, N = B H rows; n rows, q queries and
k keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_NAME = "blockwise"  # in transformers' registry of attention functions
SCORES_PER_BLOCK = 2**20  # two megabytes
QUERIES_PER_BLOCK = (
    256  # fewer are multiplied slowly; with more, causal attention computes more scores only to mask them
)
SDPA_OPTIONS = "position_bias", "softcap", "cache"  # options that only sdpa handles, or rejects


def enable_blockwise_attention(model: Any) -> None:
    """Make a transformers model that trains on a CPU in bf16 use blockwise attention instead of sdpa."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if getattr(model.config, "_attn_implementation", "") == "sdpa" and model._supports_attention_backend:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, blockwise_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(ATTENTION_NAME)


def blockwise_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend from query [B, H, L, D] to key and value [B, K, M, D]; return [B, L, H, D]. Replaces transformers' sdpa.

    The mask is bool or additive, [B, 1 or H, L or 1, M]; without a mask, a causal module attends to no later key.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    is_supported = query.dtype == torch.bfloat16 and not query.is_cuda and query.shape[-1] == value.shape[-1]
    is_square = not causal or query.shape[2] == key.shape[2]
    if dropout or not is_supported or not is_square or any(options.get(name) is not None for name in SDPA_OPTIONS):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    if (num_groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = blockwise_attention(query, key, value, _additive_mask(attention_mask, query), causal, scale)
    return output, None


def _additive_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask to be added to the scores; a query whose keys are all masked attends to all of them equally."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)


@torch.library.custom_op("manta::blockwise_attention", mutates_args=())
def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return softmax(scale * query @ key.T + mask) @ value, [B, L, H, D], of inputs [B, H, L or M, D]."""
    B, H, L, D = query.shape
    q_NLD, k_NMD, v_NMD = (tensor.flatten(0, 1).contiguous() for tensor in (query, key, value))
    o_NLD = torch.empty_like(q_NLD)
    for n, q, k in _blocks(B * H, L, key.shape[2], causal):
        p_nqk = _probabilities(q_NLD[n, q], k_NMD[n, k], _block_mask(query, mask, causal, n, q, k), scale)
        o_NLD[n, q] = torch.bmm(p_nqk, v_NMD[n, k])
    return o_NLD.view(B, H, L, D).transpose(1, 2).contiguous()


@torch.library.custom_op("manta::blockwise_attention_backward", mutates_args=())
def blockwise_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output, [B, L, H, D]."""
    tensors = (query, key, value, grad_output.transpose(1, 2))
    q_NLD, k_NMD, v_NMD, do_NLD = (tensor.flatten(0, 1).contiguous() for tensor in tensors)
    dq_NLD = torch.empty_like(q_NLD)
    dk_NMD, dv_NMD = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (k_NMD, v_NMD))
    for n, q, k in _blocks(len(q_NLD), query.shape[2], key.shape[2], causal):
        p_nqk = _probabilities(q_NLD[n, q], k_NMD[n, k], _block_mask(query, mask, causal, n, q, k), scale)
        dp_nqk = torch.bmm(do_NLD[n, q], v_NMD[n, k].mT)
        ds_nqk = torch._softmax_backward_data(dp_nqk, p_nqk, -1, p_nqk.dtype)
        dq_NLD[n, q] = torch.bmm(ds_nqk, k_NMD[n, k])
        dk_NMD[n, k] += torch.bmm(ds_nqk.mT, q_NLD[n, q])
        dv_NMD[n, k] += torch.bmm(p_nqk.mT, do_NLD[n, q])
    dq = dq_NLD.mul_(scale).view_as(query)
    return dq, dk_NMD.mul_(scale).to(key.dtype).view_as(key), dv_NMD.to(value.dtype).view_as(value)


def _blocks(num_rows: int, num_queries: int, num_keys: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the rows, queries and keys of each block."""
    queries = min(num_queries, QUERIES_PER_BLOCK)
    rows = max(1, SCORES_PER_BLOCK // (queries * num_keys))
    for row in range(0, num_rows, rows):
        for query in range(0, num_queries, queries):
            end = min(num_queries, query + queries)
            yield slice(row, min(num_rows, row + rows)), slice(query, end), slice(0, end if causal else num_keys)


def _probabilities(q_nqD: Tensor, k_nkD: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the attention probabilities P of a block, [n, q, k]."""
    return torch.softmax(torch.baddbmm(mask, q_nqD, k_nkD.mT, alpha=scale), -1)


def _block_mask(query: Tensor, mask: Tensor | None, causal: bool, n: slice, q: slice, k: slice) -> Tensor:
    """Return the additive mask of a block, which broadcasts to [n, q, k]."""
    if mask is not None:
        row = torch.arange(n.start, n.stop)
        sample, head = row // query.shape[1] % mask.shape[0], row % query.shape[1] % mask.shape[1]
        return mask[sample, head, q if mask.shape[2] > 1 else slice(None), k]
    num_queries = q.stop - q.start
    block_mask = query.new_zeros(num_queries, k.stop)
    if causal:
        block_mask[:, q] = block_mask.new_full((num_queries, num_queries), -math.inf).triu_(1)
    return block_mask


@blockwise_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    B, H, L, D = query.shape
    return query.new_empty(B, L, H, D)


@blockwise_attention_backward.register_fake
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    gradients = blockwise_attention_backward(grad_output, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return (*gradients, None, None, None)


blockwise_attention.register_autograd(_backward, setup_context=_setup_context)

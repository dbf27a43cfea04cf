"""Attention on a processor in bf16, by matrix products over blocks that its cache holds.

torch's own (flash) attention multiplies its small tiles at a tenth of the rate at which a processor with bf16 units multiplies
large matrices. Here the scores of a block of queries are one batched product, rounded to bf16 as in transformers' eager
attention; the backward pass computes them again, so that no more memory is held than by the flash kind (Dao et al. 2022,
https://arxiv.org/abs/2205.14135). What is not of this kind (a GPU, another precision, dropout, a bias) goes to sdpa.

Shapes: B batch, H heads, K heads of keys and values, L queries, M keys, D width of a head, N = B H rows; n rows, q queries
and k keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "blockwise"  # its name among transformers' implementations of attention
BLOCK = 2**20  # scores in a block: two megabytes
QUERIES = 256  # in a block: fewer are multiplied slowly, of more a causal model computes scores in vain
SPECIAL = "position_bias", "softcap", "cache"  # options that sdpa acts upon, or refuses


def use_blockwise(model: Any) -> None:
    """Let a transformers model that trains on a processor in bf16 use this attention in place of its sdpa."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if getattr(model.config, "_attn_implementation", "") == "sdpa" and model._supports_attention_backend:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(ATTENTION)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend from query [B, H, L, D] to key and value [B, K, M, D]; return [B, L, H, D]. Stands in for transformers' sdpa.

    The mask is bool or additive, [B, 1 or H, L or 1, M]; without one, a module that is causal looks at no later key.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    usual = query.dtype == torch.bfloat16 and not query.is_cuda and query.shape[-1] == value.shape[-1]
    square = not causal or query.shape[2] == key.shape[2]
    if dropout or not usual or not square or any(options.get(name) is not None for name in SPECIAL):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    if (times := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    answer: Tensor = blockwise_attention(query, key, value, _additive(attention_mask, query), causal, scale)
    return answer, None


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask as what is added to scores; a query that may look at nothing looks at everything alike."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)


@torch.library.custom_op("manta::blockwise_attention", mutates_args=())
def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return softmax(scale * query @ key.T + mask) @ value as [B, L, H, D], of [B, H, L or M, D] each."""
    B, H, L, D = query.shape
    query_NLD, key_NMD, value_NMD = (part.flatten(0, 1).contiguous() for part in (query, key, value))
    answer_NLD = torch.empty_like(query_NLD)
    for n, q, k in _blocks(B * H, L, key.shape[2], causal):
        p_nqk = _probabilities(query_NLD[n, q], key_NMD[n, k], _added(query, mask, causal, n, q, k), scale)
        answer_NLD[n, q] = torch.bmm(p_nqk, value_NMD[n, k])
    return answer_NLD.view(B, H, L, D).transpose(1, 2).contiguous()


@torch.library.custom_op("manta::blockwise_attention_backward", mutates_args=())
def blockwise_attention_backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the answer, [B, L, H, D]."""
    parts = (part.flatten(0, 1).contiguous() for part in (query, key, value, slope.transpose(1, 2)))
    query_NLD, key_NMD, value_NMD, slope_NLD = parts
    of_query_NLD = torch.empty_like(query_NLD)
    of_key_NMD, of_value_NMD = (torch.zeros_like(part, dtype=torch.float32) for part in (key_NMD, value_NMD))
    for n, q, k in _blocks(len(query_NLD), query.shape[2], key.shape[2], causal):
        p_nqk = _probabilities(query_NLD[n, q], key_NMD[n, k], _added(query, mask, causal, n, q, k), scale)
        of_p_nqk = torch.bmm(slope_NLD[n, q], value_NMD[n, k].mT)
        of_score_nqk = torch._softmax_backward_data(of_p_nqk, p_nqk, -1, p_nqk.dtype)
        of_query_NLD[n, q] = torch.bmm(of_score_nqk, key_NMD[n, k])
        of_key_NMD[n, k] += torch.bmm(of_score_nqk.mT, query_NLD[n, q])
        of_value_NMD[n, k] += torch.bmm(p_nqk.mT, slope_NLD[n, q])
    of_query = of_query_NLD.mul_(scale).view_as(query)
    return of_query, of_key_NMD.mul_(scale).to(key.dtype).view_as(key), of_value_NMD.to(value.dtype).view_as(value)


def _blocks(rows: int, queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield which of the rows, of the queries and of the keys make a block."""
    high = min(queries, QUERIES)
    wide = max(1, BLOCK // (high * keys))
    for row in range(0, rows, wide):
        for query in range(0, queries, high):
            end = min(queries, query + high)
            yield slice(row, min(rows, row + wide)), slice(query, end), slice(0, end if causal else keys)


def _probabilities(query_nqD: Tensor, key_nkD: Tensor, added: Tensor, scale: float) -> Tensor:
    """Return how much each query of a block looks at each key, [n, q, k]."""
    return torch.softmax(torch.baddbmm(added, query_nqD, key_nkD.mT, alpha=scale), -1)


def _added(query: Tensor, mask: Tensor | None, causal: bool, n: slice, q: slice, k: slice) -> Tensor:
    """Return what is added to the scores of a block: something that broadcasts to [n, q, k]."""
    if mask is not None:
        row = torch.arange(n.start, n.stop)
        sample, head = row // query.shape[1] % mask.shape[0], row % query.shape[1] % mask.shape[1]
        return mask[sample, head, q if mask.shape[2] > 1 else slice(None), k]
    queries = q.stop - q.start
    added = query.new_zeros(queries, k.stop)
    if causal:
        added[:, q] = added.new_full((queries, queries), -math.inf).triu_(1)
    return added


@blockwise_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    B, H, L, D = query.shape
    return query.new_empty(B, L, H, D)


@blockwise_attention_backward.register_fake
def _(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask)


def _back(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    found = blockwise_attention_backward(slope, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return (*found, None, None, None)


blockwise_attention.register_autograd(_back, setup_context=_keep)

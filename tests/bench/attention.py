"""Forward and backward passes of attention on a CPU in bf16: blockwise attention against torch's sdpa and transformers' eager attention.

Shapes of models that train on a CPU, [samples x heads, length, head dimension], causal or not. Predicted: 2 times sdpa's rate
(it multiplies its tiles at a tenth of the rate of large matrices, but our scores go through memory), 1.5 times eager's at short
lengths and more at long ones, whose scores do not fit into the cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.attention import blockwise_attention
from engine.train import hardware
from tests.bench.interleaved import interleave, show

SHAPES = {
    "llama_5m": (16, 8, 256, 32, True),
    "30 M parameters": (8, 8, 512, 64, True),
    "GPT-2": (4, 12, 1024, 64, True),
    "long": (1, 12, 4096, 64, True),
    "BERT": (16, 12, 128, 64, False),
}
PASSES = 5


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Compute torch's attention, with the output transposed as models need it."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).contiguous()


def eager(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Compute attention as transformers' `eager_attention_forward` does."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], torch.finfo(scores.dtype).min, dtype=scores.dtype).triu(1)
    return (F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2).contiguous()


def ours(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Compute blockwise attention."""
    output: Tensor = blockwise_attention(query, key, value, None, causal, query.shape[-1] ** -0.5)
    return output


def rate(attention: Callable[..., Tensor], tensors: list[Tensor], grad_output: Tensor, causal: bool) -> float:
    """Return forward and backward passes per second."""
    start = time.perf_counter()
    for _ in range(PASSES):
        torch.autograd.grad(attention(*tensors, causal), tensors, grad_output)
    return PASSES / (time.perf_counter() - start)


def main() -> None:
    """Print the ratios for each shape."""
    if not hardware.has_bf16():
        raise SystemExit("this CPU has no bf16: training here is in fp32, with torch's attention")
    torch.set_num_threads(os.cpu_count() or 1)
    for name, (samples, heads, length, head_dim, causal) in SHAPES.items():
        shape, options = (samples, length, heads, head_dim), {"dtype": torch.bfloat16}
        tensors = [torch.randn(shape, **options).transpose(1, 2).requires_grad_() for _ in range(3)]
        grad_output = torch.randn(shape, **options)
        print(f"\n{name}: {samples} x {heads}, {length}, {head_dim}{', causal' if causal else ''}")
        functions = (ours, sdpa, eager)
        rates = interleave({f.__name__: partial(rate, f, tensors, grad_output, causal) for f in functions})
        show(rates, "passes/s", "ours", {"sdpa": 1.0, "eager": 1.0}, name)


if __name__ == "__main__":
    main()

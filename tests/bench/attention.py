"""Forward and backward of attention on a processor in bf16: ours by blocks against torch's sdpa and the eager kind of transformers.

Shapes of models that train on a processor, [samples x heads, length, width of a head], causal or not. Predicted: 2 of sdpa's
rate (its tiles are multiplied at a tenth of the rate of whole matrices, but our scores go through memory), 1.5 of eager's at
short lengths and more at long ones, whose scores no cache holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

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
TURNS = 5


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attend as torch does, with its output in the order that models ask for."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).contiguous()


def eager(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attend as `eager_attention_forward` of transformers does."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], torch.finfo(scores.dtype).min, dtype=scores.dtype).triu(1)
    return (F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2).contiguous()


def ours(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attend by blocks."""
    answer: Tensor = blockwise_attention(query, key, value, None, causal, query.shape[-1] ** -0.5)
    return answer


def rate(attend: Callable[..., Tensor], parts: list[Tensor], slope: Tensor, causal: bool) -> float:
    """Return forward and backward passes a second."""
    began = time.perf_counter()
    for _ in range(TURNS):
        torch.autograd.grad(attend(*parts, causal), parts, slope)
    return TURNS / (time.perf_counter() - began)


def main() -> None:
    """Print the ratios for each shape."""
    if not hardware.has_bf16():
        raise SystemExit("this processor has no bf16: training here is in fp32, with torch's attention")
    torch.set_num_threads(os.cpu_count() or 1)
    for name, (samples, heads, length, width, causal) in SHAPES.items():
        like: dict[str, Any] = {"dtype": torch.bfloat16}
        parts = [torch.randn(samples, length, heads, width, **like).transpose(1, 2).requires_grad_() for _ in range(3)]
        slope = torch.randn(samples, length, heads, width, **like)
        print(f"\n{name}: {samples} x {heads}, {length}, {width}{', causal' if causal else ''}")
        kinds = (ours, sdpa, eager)
        found = interleave({kind.__name__: partial(rate, kind, parts, slope, causal) for kind in kinds})
        show(found, "passes/s", "ours", {"sdpa": 1.0, "eager": 1.0}, name)


if __name__ == "__main__":
    main()

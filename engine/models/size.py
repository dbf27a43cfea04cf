"""Parameters and floating-point operations of a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Stack:
    """A stack of transformer blocks."""

    config: Any  # the transformers config, or the part of one, that says its layers and widths
    tokens: int  # of a full sample that pass through it


def elements(parameter: Any) -> int:
    """Return the elements of a parameter; of one that ZeRO-3 sharded, its full size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_count(model: nn.Module) -> int:
    """Count the parameters, shared ones once (those sharded by ZeRO-3 at their full size)."""
    return sum(elements(p) for p in model.parameters())


def matmul_parameter_count(model: nn.Module) -> int:
    """Count the parameters that take part in a matrix product: all but embeddings, unless these are an output's weights too."""
    multiplied = {
        id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return sum(
        elements(p)
        for name, p in model.named_parameters()
        if not (id(p) in looked_up - multiplied or "position" in name or "wpe" in name)
    )


def flops_per_token(model: nn.Module, config: Any, length: int) -> float:
    """Return forward + backward floating-point operations a token: 6 N + 12 layers x width x length.

    Chowdhery et al. 2022 (PaLM), appendix B: attention counted in full, as is the custom for MFU.
    """
    return 6 * matmul_parameter_count(model) + attention_flops(config.num_hidden_layers, config.hidden_size, length)


def attention_flops(layers: int, width: int, keys: int) -> float:
    """Return the operations of a token that attends to `keys` others in each layer, forward and backward."""
    return 12 * layers * width * keys

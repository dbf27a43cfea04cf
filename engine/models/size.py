"""Parameters and floating-point operations of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
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
    return sum(elements(p) for p, _ in _multiplied(model))


def matmul_flops(model: nn.Module) -> int:
    """Return the operations a token, forward and backward, of a model's products: 6 for each weight that is trained.

    Two are the forward's, two the gradient's of the weight, which a frozen one has not, and two that of its inputs, which
    those before the first that is trained have not either.
    """
    weights = list(_multiplied(model))
    trained = [p.requires_grad for p, _ in weights]
    first = trained.index(True) if any(trained) else len(weights)
    return sum(
        elements(p) * (2 + 2 * p.requires_grad + 2 * (i >= first or (tied and first < len(weights))))
        for i, (p, tied) in enumerate(weights)
    )


def _multiplied(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield each parameter of a matrix product once, in the model's order, and whether it is an embedding's as well."""
    products = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if not (id(p) in looked_up - products or "position" in name or "wpe" in name):
            yield p, id(p) in looked_up


def flops_per_token(model: nn.Module, config: Any, length: int) -> float:
    """Return forward + backward floating-point operations a token: 6 N + 12 layers x width x length, where all is trained.

    Chowdhery et al. 2022 (PaLM), appendix B: attention counted in full, as is the custom for MFU.
    """
    return matmul_flops(model) + attention_flops(config.num_hidden_layers, config.hidden_size, length)


def attention_flops(layers: int, width: int, keys: int) -> float:
    """Return the operations of a token that attends to `keys` others in each layer, forward and backward."""
    return 12 * layers * width * keys

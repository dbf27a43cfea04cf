"""Parameter counts and floating-point operations of a model, on the meta device as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class TransformerStack:
    """A stack of transformer blocks: an encoder, a decoder, or a tower."""

    config: Any  # the transformers config, or the nested config, that holds its layers and widths
    tokens: int  # of a full sample that pass through it


def num_elements(parameter: Any) -> int:
    """Return the elements of a parameter; if ZeRO-3 sharded it, those of the full parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_count(model: nn.Module) -> int:
    """Count the parameters, shared ones once, and those sharded by ZeRO-3 at their full size."""
    return sum(num_elements(p) for p in model.parameters())


def matmul_parameter_count(model: nn.Module) -> int:
    """Count the parameters used in matrix products: all but embeddings that are not tied to an output layer."""
    return sum(num_elements(p) for p, _ in _matmul_parameters(model))


def matmul_flops(model: nn.Module) -> int:
    """Return the FLOPs per token, forward and backward, of a model's matrix products: 6 per trained weight.

    Two are for the forward pass, two for the weight's gradient, which a frozen weight does not need, and two for the gradient
    of its inputs, which the weights before the first trained one do not need.
    """
    weights = list(_matmul_parameters(model))
    trained = [p.requires_grad for p, _ in weights]
    first = trained.index(True) if any(trained) else len(weights)
    return sum(
        num_elements(p) * (2 + 2 * p.requires_grad + 2 * (i >= first or (is_tied and first < len(weights))))
        for i, (p, is_tied) in enumerate(weights)
    )


def _matmul_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield each parameter used in a matrix product once, in the model's order, and whether it is tied to an embedding."""
    multiplied = {
        id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if not (id(p) in embedded - multiplied or "position" in name or "wpe" in name):
            yield p, id(p) in embedded


def flops_per_token(model: nn.Module, config: Any, length: int) -> float:
    """Return the FLOPs per token, forward and backward: 6 N + 12 layers x width x length if all parameters are trained.

    Chowdhery et al. 2022 (PaLM), appendix B: causal attention is counted in full, as is usual for MFU.
    """
    return matmul_flops(model) + attention_flops(config.num_hidden_layers, config.hidden_size, length)


def attention_flops(layers: int, width: int, keys: int) -> float:
    """Return the FLOPs, forward and backward, of a token that attends to `keys` tokens in each layer."""
    return 12 * layers * width * keys

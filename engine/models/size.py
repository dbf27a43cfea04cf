"""Parameters and floating-point operations of a model, from its config alone."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_count(model: nn.Module) -> int:
    """Count the parameters, shared ones once (those sharded by ZeRO-3 at their full size)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def matmul_parameter_count(model: nn.Module) -> int:
    """Count the parameters that take part in a matrix product: all but the input embeddings, unless these are the output's too."""
    total = parameter_count(model)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    tied = output is not None and output.weight is embedding.weight
    positions = sum(
        getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters() if "position" in name or "wpe" in name
    )
    return total - positions - (0 if tied else getattr(embedding.weight, "ds_numel", embedding.weight.numel()))


def flops_per_token(model: nn.Module, config: Any, length: int) -> float:
    """Return forward + backward floating-point operations a token: 6 N + 12 layers x width x length.

    Chowdhery et al. 2022 (PaLM), appendix B: attention counted in full, as is the custom for MFU.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * length
    return 6 * matmul_parameter_count(model) + attention

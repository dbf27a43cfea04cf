"""Memory of a training worker by kind, for each ZeRO stage. Computed, in bytes.

Weights, gradients and optimizer: Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054), section 3, for what this
engine holds: AdamW in fp32 (4 + 4 bytes), and in bf16 fp32 master weights besides (4 more). Activations: Korthikanti et
al. 2022 (https://arxiv.org/abs/2205.05198), section 4.1, without dropout masks and without the attention matrix, which
scaled-dot-product attention never holds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from engine.config import Config


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(getattr(self, f.name) for f in fields(self))


def memory(config: Config, shape: Any, parameters: int, vocabulary: int, stage: int, precision: str) -> MemoryPlan:
    """Return a worker's memory for a transformers config `shape` with `parameters` parameters, all of them trained."""
    world, wide = config.train.workers, 2 if precision == "bf16" else 4
    low = parameters * wide
    offload = config.zero.offload_optimizer != "none"
    states = 0 if offload else parameters * (8 if precision == "fp32" else 12)
    tokens = config.micro_batch * config.data.sequence_length
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    inner = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * hidden
    # Inputs of each product, norm and non-linearity in a block: about 10 hidden and 3 inner widths a token.
    block = tokens * (10 * hidden + 3 * inner) * wide
    activations = tokens * hidden * layers * wide + block if config.train.activation_checkpointing else block * layers
    return MemoryPlan(
        weights=low / (world if stage == 3 else 1),
        gradients=low / (world if stage >= 2 else 1),
        optimizer=states / (world if stage >= 1 else 1),
        activations=activations,
        logits=tokens * vocabulary * (4 + 4 + wide),  # fp32 copy, its gradient, and the model's own
    )

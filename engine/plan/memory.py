"""Memory of a training worker by kind, for each ZeRO stage: computed, in bytes.

Weights, gradients and optimizer follow Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054), section 3, for what
engine/train/zero.py holds. Activations follow the accounting of Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198),
section 4.1: what each operation keeps for the backward pass. Here these are transformers' own modules, run eagerly, with
scaled-dot-product attention, which never holds the attention matrix, and without dropout masks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from engine.config import Config
from engine.objectives.contract import objective_class

MOMENTS = 8  # bytes a parameter: AdamW's two, in fp32
MASTER = 4  # bytes a parameter: fp32 weights beside the model's own
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
LIVE = 1_000_000_000  # parameters that stage 3 holds whole at a time: DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker: on its device, and what offload keeps in main memory (`host`)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    host: float

    @property
    def total(self) -> float:
        """All that is on the device."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


def memory(config: Config, shape: Any, parameters: int, trained: int, stage: int, precision: str) -> MemoryPlan:
    """Return a worker's memory for a transformers config `shape`; `trained` of its `parameters` aren't frozen."""
    workers, width = config.train.workers, 2 if precision == "bf16" else 4
    # DeepSpeed clones the part that a rank updates, in fp32 too; only without ZeRO are fp32 weights their own master copy.
    master = 0 if precision == "fp32" and stage == 0 else MASTER
    weights = parameters * width / (workers if stage == 3 else 1)
    optimizer = trained * (MOMENTS + master) / (workers if stage >= 1 else 1)
    optimizer_away = stage >= 1 and config.zero.offload_optimizer != "none"
    weights_away = stage == 3 and config.zero.offload_param != "none"
    tokens = config.micro_batch * config.data.sequence_length
    layers, block = shape.num_hidden_layers, tokens * width * block_widths(shape)
    kept = (
        tokens * width * shape.hidden_size * layers + block if config.train.activation_checkpointing else block * layers
    )
    logits = tokens * shape.vocab_size if objective_class(config.objective.name).over_vocabulary else 0
    return MemoryPlan(
        weights=0 if weights_away else weights,
        gradients=trained * width / (workers if stage >= 2 else 1),
        optimizer=0 if optimizer_away else optimizer,
        activations=kept,
        logits=logits * (width + 4 + 4),  # the model's, an fp32 copy, its gradient
        buffers=(min(REDUCE_BUCKET, trained) if stage >= 1 else 0) * width
        + (min(LIVE, parameters) if stage == 3 else 0) * width,
        host=(weights if weights_away else 0) + (optimizer if optimizer_away else 0),
    )


def block_widths(shape: Any) -> float:
    """Return the elements that one block keeps of each token for the backward pass.

    Two norms, queries, values and outputs before and after their products: 10 hidden widths; keys and values: 1 each, or less with grouped queries;
    the MLP's product, non-linearity (in elementary steps) and gate: 4 inner widths. Measured for llama and gpt2: within 10 % (a test holds it).
    """
    hidden = shape.hidden_size
    grouped = (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads) / shape.num_attention_heads
    inner = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * hidden
    return (10 + 2 * grouped) * hidden + 4 * inner

"""Peak memory of a training worker by kind, for each ZeRO stage: computed, in bytes, in the phase of a step that needs most.

Weights, gradients and optimizer follow Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054), section 3, for what
engine/train/zero.py holds; what DeepSpeed copies between them follows its stage_1_and_2.py and stage3.py. Activations follow
the accounting of Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), section 4.1: what each operation keeps for the
backward pass. Here these are transformers' own modules, run eagerly, with scaled-dot-product attention, which never holds
the attention matrix, and without dropout masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from engine.config import Config
from engine.models.cross_entropy import default_chunk_tokens
from engine.models.size import TransformerStack, parameter_count
from engine.objectives.contract import objective_class
from engine.train.optimizer import parameter_groups

FP32 = 4  # bytes
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
MAX_LIVE_PARAMETERS = (
    1_000_000_000  # parameters that stage 3 holds unsharded at a time: DeepSpeed's stage3_max_live_parameters
)
PREFETCH_BUCKET = 50_000_000  # parameters that stage 3 gathers (and copies) at a time: stage3_prefetch_bucket_size
SUB_GROUP = 1_000_000_000  # elements that stage 3 updates at a time: DeepSpeed's sub_group_size


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that its memory depends on."""

    parameters: int
    trainable: int  # parameters that aren't frozen
    moment_elements: int  # elements: AdamW keeps two for a trainable parameter, Muon one
    stacks: list[TransformerStack]  # of blocks, with the tokens of a sample in each
    head: tuple[int, int] = (0, 0)  # of the output embedding, if the objective has an LM head: vocabulary, width
    num_target_tokens: int = 0  # tokens of a sample whose logits the objective needs

    @classmethod
    def from_model(cls, model: Any, config: Config) -> ModelSizes:
        """Count the parameters of a model, which may be on the meta device."""
        task = objective_class(config.objective.name)(config.objective, None, config.data.sequence_length)
        stacks = task.transformer_stacks(model.config)
        groups = parameter_groups(model, config.optim)
        trained = {False: 0, True: 0}
        for group in groups:
            trained[group["muon"]] += sum(p.numel() for p in group["params"])
        head = model.get_output_embeddings() if task.has_lm_head else None
        return cls(
            parameters=parameter_count(model),
            trainable=sum(trained.values()),
            moment_elements=2 * trained[False] + trained[True],
            stacks=stacks,
            head=tuple(head.weight.shape) if head is not None else (0, 0),
            num_target_tokens=task.num_target_tokens(stacks[-1].tokens),
        )


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker in one phase of a step: on its device, and of offloaded states in main memory (`host`)."""

    phase: str  # loss, backward, reduction or update
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    host: float

    @property
    def total(self) -> float:
        """Total bytes on the device."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name not in ("phase", "host"))


def peak_memory(config: Config, sizes: ModelSizes, stage: int, precision: str) -> WorkerMemory:
    """Return a worker's memory in the phase of a step that needs most."""
    return max(step_memory(config, sizes, stage, precision), key=lambda plan: plan.total)


def step_memory(config: Config, sizes: ModelSizes, stage: int, precision: str) -> Iterator[WorkerMemory]:
    """Yield a worker's memory in the four phases of a step's last micro-batch, one of which is the peak."""
    workers, width = config.train.workers, FP32 if precision == "fp32" else 2
    shard = 1 / workers
    trained = sizes.trainable
    weights = sizes.parameters * width * (shard if stage == 3 else 1)
    optimizer = optimizer_bytes(config, sizes, stage, precision)
    optimizer_offloaded = stage >= 1 and config.zero.offload_optimizer != "none"
    weights_offloaded = stage == 3 and config.zero.offload_param != "none"
    # With offload the gradients are in main memory too: in fp32 for the update, and in the model's precision while they accumulate.
    offloaded = optimizer + trained * shard * (FP32 + width) if optimizer_offloaded else 0
    gradients, flat = trained * width, trained * width * shard
    passes = -(-config.samples_per_worker // config.micro_batch)
    held = {0: gradients, 1: gradients, 2: 0 if optimizer_offloaded else flat, 3: flat}[stage] if passes > 1 else 0
    if stage == 3:  # in one flat tensor that is allocated once
        held = 0 if optimizer_offloaded else flat
    bucket = min(REDUCE_BUCKET, trained) * width  # stage 3 allocates it once, too
    persistent = bucket if stage == 3 else 0
    # With one worker stage 3 gathers nothing.
    live = (min(MAX_LIVE_PARAMETERS, sizes.parameters) + min(PREFETCH_BUCKET, sizes.parameters)) * width
    if stage < 3 or (workers == 1 and not weights_offloaded):
        live = 0

    def at(phase: str, gradients: float, activations: float, logits: float, buffers: float) -> WorkerMemory:
        return WorkerMemory(
            phase=phase, weights=0 if weights_offloaded else weights, gradients=gradients,
            optimizer=0 if optimizer_offloaded else optimizer, activations=activations, logits=logits, buffers=buffers,
            host=offloaded + (weights if weights_offloaded else 0),
        )  # fmt: skip

    kept, recomputed = activation_bytes(config, sizes.stacks, width)
    loss, after = loss_bytes(config, sizes, width)
    yield at("loss", held, kept, loss, persistent + live)
    yield at("backward", held, kept + recomputed, after, persistent + live)
    # Gradients are in the bucket, and once more while they are reduced or the rank's shard is copied out of it. If they
    # don't fit in one bucket, stages 2 and 3 have freed those of the buckets before.
    in_bucket = min(bucket, gradients)
    if stage < 2:
        yield at("reduction", gradients, 0, 0, in_bucket)
    elif stage == 2:
        yield at("reduction", max(in_bucket, flat) + held, 0, 0, in_bucket)
    else:
        copies = 2 if runs_on_cpu(config) else 1  # Gloo copies its input
        yield at("reduction", held, 0, 0, persistent + in_bucket * copies)
    # The update needs gradients in fp32: flat (stages 1 to 3, which copy even fp32 ones), or one by one.
    if stage == 0:
        yield at("update", gradients, 0, 0, trained * FP32 if width < FP32 else 0)
    elif not optimizer_offloaded:
        part = min(flat, SUB_GROUP * width) if stage == 3 else flat
        yield at("update", flat, 0, 0, persistent + part + (part / width * FP32 if width < FP32 else 0))


def runs_on_cpu(config: Config) -> bool:
    """Return whether the plan is for this machine's CPU, whose only memory is main memory."""
    return config.plan.device == "here" and not torch.cuda.is_available()


def optimizer_bytes(config: Config, sizes: ModelSizes, stage: int, precision: str) -> float:
    """Return the bytes of a worker's master weights, moments and moving average, on the device or offloaded."""
    # DeepSpeed clones the shard that a rank updates, even in fp32; only without ZeRO are fp32 weights their own master weights.
    copies = (0 if precision == "fp32" and stage == 0 else 1) + (1 if config.train.ema else 0)
    return FP32 * (sizes.trainable * copies + sizes.moment_elements) / (config.train.workers if stage >= 1 else 1)


def activation_bytes(config: Config, stacks: list[TransformerStack], width: int) -> tuple[float, float]:
    """Return the bytes that a micro-batch's blocks keep for the backward pass, and those of one block that is recomputed."""
    kept, recomputed = 0.0, 0.0
    for stack in stacks:
        tokens = config.micro_batch * stack.tokens / config.train.sequence_parallel
        layers = stack.config.num_hidden_layers
        block = tokens * width * block_activation_widths(stack.config)
        if config.train.activation_checkpointing:
            kept += tokens * width * stack.config.hidden_size * layers
            recomputed = max(recomputed, block)
        else:
            kept += block * layers
    return kept, recomputed


def loss_bytes(config: Config, sizes: ModelSizes, width: int) -> tuple[float, float]:
    """Return the bytes of the loss of an LM head: at its peak, and as the backward pass begins.

    engine/models/cross_entropy.py holds the logits of a chunk of tokens at a time (and, except on a CPU, their log-
    probabilities in fp32), and the gradients of hidden states and output embedding.
    """
    vocabulary, hidden = sizes.head
    tokens = config.micro_batch * sizes.num_target_tokens / config.train.sequence_parallel
    if not tokens:
        return 0.0, 0.0
    chunk = config.objective.logits_chunk
    if chunk == 0:
        return tokens * vocabulary * 2.0 * FP32, tokens * vocabulary * 3.0 * FP32
    rows = chunk or default_chunk_tokens(vocabulary)
    one_chunk = tokens <= rows
    logits = min(tokens, rows) * vocabulary * (width * (1 if one_chunk else 2) + (0 if runs_on_cpu(config) else FP32))
    states, stored = tokens * hidden * width, vocabulary * hidden * (width if one_chunk else FP32)
    scaled = stored if one_chunk else stored + vocabulary * hidden * (width % FP32)
    return states + logits + stored, states * 2.0 + stored + scaled


def block_activation_widths(model_config: Any) -> float:
    """Return the elements that one block keeps for the backward pass, for each token.

    Two norms, queries, values and outputs before and after their products: 10 hidden widths; keys and values: 1 each, or less with grouped-query attention;
    the MLP's product, non-linearity (in elementary steps) and gate: 4 inner widths. Measured for llama and gpt2: within 10 % (tests/engine/plan/test_plan.py).
    """
    hidden = model_config.hidden_size
    kv_share = (
        getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
    ) / model_config.num_attention_heads
    inner = next(
        (getattr(model_config, n) for n in ("intermediate_size", "n_inner", "d_ff") if getattr(model_config, n, None)),
        4 * hidden,
    )
    return (10 + 2 * kv_share) * hidden + 4 * inner

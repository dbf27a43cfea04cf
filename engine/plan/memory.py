"""Memory of a training worker by kind, for each ZeRO stage: computed, in bytes, at the moment of a step when most is held.

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
from engine.models.cross_entropy import chunk_rows
from engine.models.size import Stack, parameter_count
from engine.objectives.contract import objective_class
from engine.train.optimizer import parameter_groups

FP32 = 4  # bytes
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
LIVE = 1_000_000_000  # parameters that stage 3 holds whole at a time: DeepSpeed's stage3_max_live_parameters
PREFETCH = 50_000_000  # parameters that stage 3 gathers at a time, and copies then: stage3_prefetch_bucket_size
SUB_GROUP = 1_000_000_000  # elements that stage 3 updates at a time: DeepSpeed's sub_group_size


@dataclass(frozen=True)
class Sizes:
    """What of a model decides its memory."""

    parameters: int
    trained: int  # of the parameters, those that aren't frozen
    moments: int  # elements: AdamW keeps two for a trained parameter, Muon one
    stacks: list[Stack]  # of blocks, and the tokens of a sample in each
    head: tuple[int, int] = (0, 0)  # of the output embedding over a vocabulary, if the task has one: vocabulary, width
    predicted: int = 0  # tokens of a sample whose logits the task asks for

    @classmethod
    def of(cls, model: Any, config: Config) -> Sizes:
        """Count them, on the meta device or any other."""
        task = objective_class(config.objective.name)(config.objective, None, config.data.sequence_length)
        stacks = task.stacks(model.config)
        groups = parameter_groups(model, config.optim)
        trained = {False: 0, True: 0}
        for group in groups:
            trained[group["muon"]] += sum(p.numel() for p in group["params"])
        head = model.get_output_embeddings() if task.over_vocabulary else None
        return cls(
            parameters=parameter_count(model),
            trained=sum(trained.values()),
            moments=2 * trained[False] + trained[True],
            stacks=stacks,
            head=tuple(head.weight.shape) if head is not None else (0, 0),
            predicted=task.predicted(stacks[-1].tokens),
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker at one moment of a step: on its device, and what offload keeps in main memory (`host`)."""

    moment: str  # loss, backward, reduction or update
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
        return sum(getattr(self, f.name) for f in fields(self) if f.name not in ("moment", "host"))


def memory(config: Config, sizes: Sizes, stage: int, precision: str) -> MemoryPlan:
    """Return a worker's memory at the moment when it is highest."""
    return max(moments(config, sizes, stage, precision), key=lambda plan: plan.total)


def moments(config: Config, sizes: Sizes, stage: int, precision: str) -> Iterator[MemoryPlan]:
    """Yield a worker's memory at the four moments of a step's last micro-batch that may be the highest."""
    workers, width = config.train.workers, FP32 if precision == "fp32" else 2
    own = 1 / workers
    trained = sizes.trained
    weights = sizes.parameters * width * (own if stage == 3 else 1)
    optimizer = optimizer_bytes(config, sizes, stage, precision)
    optimizer_away = stage >= 1 and config.zero.offload_optimizer != "none"
    weights_away = stage == 3 and config.zero.offload_param != "none"
    # Offloaded, gradients are in main memory too: in fp32 for the update, and in the model's precision as they add up.
    away = optimizer + trained * own * (FP32 + width) if optimizer_away else 0
    gradients, flat = trained * width, trained * width * own
    passes = -(-config.share // config.micro_batch)
    held = {0: gradients, 1: gradients, 2: 0 if optimizer_away else flat, 3: flat}[stage] if passes > 1 else 0
    if stage == 3:  # in one flat tensor that stays
        held = 0 if optimizer_away else flat
    bucket = min(REDUCE_BUCKET, trained) * width  # stage 3's stays, too
    staying = bucket if stage == 3 else 0
    # With one worker stage 3 gathers nothing.
    live = (min(LIVE, sizes.parameters) + min(PREFETCH, sizes.parameters)) * width
    if stage < 3 or (workers == 1 and not weights_away):
        live = 0

    def at(moment: str, gradients: float, activations: float, logits: float, buffers: float) -> MemoryPlan:
        return MemoryPlan(
            moment=moment, weights=0 if weights_away else weights, gradients=gradients,
            optimizer=0 if optimizer_away else optimizer, activations=activations, logits=logits, buffers=buffers,
            host=away + (weights if weights_away else 0),
        )  # fmt: skip

    kept, recomputed = activation_bytes(config, sizes.stacks, width)
    loss, after = loss_bytes(config, sizes, width)
    yield at("loss", held, kept, loss, staying + live)
    yield at("backward", held, kept + recomputed, after, staying + live)
    # Gradients lie in the bucket, and once more as the ranks add them up or the own part is copied out of it. Where they
    # don't fit a bucket, stages 2 and 3 have let go of the others before.
    inside = min(bucket, gradients)
    if stage < 2:
        yield at("reduction", gradients, 0, 0, inside)
    elif stage == 2:
        yield at("reduction", max(inside, flat) + held, 0, 0, inside)
    else:
        copies = 2 if on_processor(config) else 1  # Gloo copies its input
        yield at("reduction", held, 0, 0, staying + inside * copies)
    # The update takes gradients in fp32: flat (stages 1 to 3, where a copy is made even of fp32), or each beside its own.
    if stage == 0:
        yield at("update", gradients, 0, 0, trained * FP32 if width < FP32 else 0)
    elif not optimizer_away:
        part = min(flat, SUB_GROUP * width) if stage == 3 else flat
        yield at("update", flat, 0, 0, staying + part + (part / width * FP32 if width < FP32 else 0))


def on_processor(config: Config) -> bool:
    """Tell whether the plan is for this machine's processor, which has no memory but the main one."""
    return config.plan.device == "here" and not torch.cuda.is_available()


def optimizer_bytes(config: Config, sizes: Sizes, stage: int, precision: str) -> float:
    """Return the bytes of a worker's master weights, moments and moving average, wherever they are kept."""
    # DeepSpeed clones the part that a rank updates, in fp32 too; only without ZeRO are fp32 weights their own master copy.
    copies = (0 if precision == "fp32" and stage == 0 else 1) + (1 if config.train.ema else 0)
    return FP32 * (sizes.trained * copies + sizes.moments) / (config.train.workers if stage >= 1 else 1)


def activation_bytes(config: Config, stacks: list[Stack], width: int) -> tuple[float, float]:
    """Return the bytes that a micro-batch's blocks keep for the backward pass, and those of a block that is computed again."""
    kept, recomputed = 0.0, 0.0
    for stack in stacks:
        tokens = config.micro_batch * stack.tokens / config.train.sequence_parallel
        layers = stack.config.num_hidden_layers
        block = tokens * width * block_widths(stack.config)
        if config.train.activation_checkpointing:
            kept += tokens * width * stack.config.hidden_size * layers
            recomputed = max(recomputed, block)
        else:
            kept += block * layers
    return kept, recomputed


def loss_bytes(config: Config, sizes: Sizes, width: int) -> tuple[float, float]:
    """Return the bytes of the loss over a vocabulary, at its highest and as the backward pass begins.

    engine/models/cross_entropy.py holds the logits of some tokens at a time (and, but on a processor, their logarithmic
    probabilities in fp32), and the gradients of hidden states and output embedding.
    """
    vocabulary, hidden = sizes.head
    tokens = config.micro_batch * sizes.predicted / config.train.sequence_parallel
    if not tokens:
        return 0.0, 0.0
    chunk = config.objective.logits_chunk
    if chunk == 0:
        return tokens * vocabulary * 2.0 * FP32, tokens * vocabulary * 3.0 * FP32
    rows = chunk or chunk_rows(vocabulary)
    single = tokens <= rows
    logits = min(tokens, rows) * vocabulary * (width * (1 if single else 2) + (0 if on_processor(config) else FP32))
    states, stored = tokens * hidden * width, vocabulary * hidden * (width if single else FP32)
    scaled = stored if single else stored + vocabulary * hidden * (width % FP32)
    return states + logits + stored, states * 2.0 + stored + scaled


def block_widths(shape: Any) -> float:
    """Return the elements that one block keeps of each token for the backward pass.

    Two norms, queries, values and outputs before and after their products: 10 hidden widths; keys and values: 1 each, or less with grouped queries;
    the MLP's product, non-linearity (in elementary steps) and gate: 4 inner widths. Measured for llama and gpt2: within 10 % (a test holds it).
    """
    hidden = shape.hidden_size
    grouped = (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads) / shape.num_attention_heads
    inner = next(
        (getattr(shape, n) for n in ("intermediate_size", "n_inner", "d_ff") if getattr(shape, n, None)), 4 * hidden
    )
    return (10 + 2 * grouped) * hidden + 4 * inner

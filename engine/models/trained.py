"""Which weights of a model are trained: all, those behind the first blocks, or what LoRA adds."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from engine.config import ObjectiveConfig
from engine.errors import UserError
from engine.models.build import embedding_parts, stacks_of
from engine.models.lora import add_lora

Model = TypeVar("Model", bound=nn.Module)


def choose_trained(model: Model, options: ObjectiveConfig, seed: int, head: bool) -> Model:
    """Freeze what is not to be trained, add what is trained instead, and return the model.

    `head`: whether the task has a head of its own, which no pre-training has seen. Raises UserError where the model has not
    what is asked to be frozen or adapted.
    """
    freeze_layers(model, options.frozen_layers)
    add_lora(model, options.lora, seed, head)
    return model


def freeze_layers(model: nn.Module, layers: int) -> None:
    """Keep the embeddings and the first `layers` blocks of each stack as they are; 0 freezes nothing."""
    if layers == 0:
        return
    stacks = stacks_of(model)
    least = min(len(blocks) for blocks in stacks)
    if layers > least:
        raise UserError(
            f"objective.frozen_layers {layers} is more than the model's {least} blocks: use {least} or less"
        )
    for part in (*embedding_parts(model), *(block for blocks in stacks for block in blocks[:layers])):
        part.requires_grad_(False)

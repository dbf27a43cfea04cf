"""Which parameters of a model are trained: all, those after the first blocks, or LoRA's."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from engine.config import ObjectiveConfig
from engine.errors import UserError
from engine.models.build import block_lists, embedding_modules
from engine.models.lora import add_lora

Model = TypeVar("Model", bound=nn.Module)


def select_trainable(model: Model, options: ObjectiveConfig, seed: int, train_head: bool) -> Model:
    """Freeze the layers that `options` name, add LoRA if they ask for it, and return the model.

    `train_head`: with LoRA, train the task's own head, which is not pre-trained. Raises UserError if the model lacks the
    layers to be frozen or adapted.
    """
    freeze_layers(model, options.frozen_layers)
    add_lora(model, options.lora, seed, train_head)
    return model


def freeze_layers(model: nn.Module, layers: int) -> None:
    """Freeze the embeddings and the first `layers` blocks of each stack; 0 freezes nothing."""
    if layers == 0:
        return
    stacks = block_lists(model)
    max_layers = min(len(blocks) for blocks in stacks)
    if layers > max_layers:
        raise UserError(
            f"objective.frozen_layers {layers} is more than the model's {max_layers} blocks: use {max_layers} or less"
        )
    for module in (*embedding_modules(model), *(block for blocks in stacks for block in blocks[:layers])):
        module.requires_grad_(False)

"""The model that a run begins with. At ZeRO stage 3, which leaves each rank a part of it, a node holds it whole only once."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import TrainConfig
from engine.errors import UserError
from engine.models.attention import enable_blockwise_attention
from engine.models.build import build_model, model_from_config, load_pretrained, enable_gradient_checkpointing, load_or_make_config, block_lists
from engine.models.trained import select_trainable
from engine.objectives.contract import Objective
from engine.train.checkpoint import Checkpoint
from engine.train.process_group import Group
from engine.train.job import Job

Make = Callable[[Job, Objective], Any]  # makes the model that a run begins with, before any part is added or frozen


def start_model(
    job: Job, objective: Objective, group: Group, checkpoint: Checkpoint | None, make: Make | None = None
) -> Any:
    """Return the model in fp32 with the weights of the checkpoint, else of the bundle, else fresh ones from the seed.

    `make` makes what it begins with in another way than `fresh`.
    At stage 3 with several ranks one of each node makes it and lays it in a file, and all of the node map that into
    memory: what they see of it is there once, and none of it is theirs until they take their part.
    """
    shared = job.config.zero.stage == 3 and group.world > 1
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    whole = make_model(job, objective, checkpoint, make) if first or not shared else None
    if not shared:
        return whole
    with tempfile.TemporaryDirectory(prefix="manta-") if first else contextlib.nullcontext("") as folder:
        if whole is not None:
            write_mmap(whole, Path(folder) / "start.safetensors")
        mine = {"host": np.array(socket.gethostname()), "folder": np.array(folder)}
        told = [entry for entry in group.gather(mine) if entry["folder"].item()]
        place = next(entry["folder"].item() for entry in told if entry["host"].item() == socket.gethostname())
        model = whole if whole is not None else _with_parts(empty_model(job, objective), job, objective)
        attach_mmap(model, Path(place) / "start.safetensors")
        group.barrier()  # the file may go: it stays in memory as long as it is mapped
    return model


def make_model(job: Job, objective: Objective, checkpoint: Checkpoint | None = None, make: Make | None = None) -> Any:
    """Make the start state whole: the bundle's weights, else fresh ones from the seed; then the checkpoint's, if any."""
    model = _with_parts((make or fresh)(job, objective), job, objective)
    if checkpoint:
        load_weights(model, checkpoint)
    return model


def fresh(job: Job, objective: Objective) -> Any:
    """Make the bundle's model, else one of fresh weights from the seed."""
    config, options = job.config, objective.model_options()
    if job.start:
        return load_pretrained(job.start, objective.auto_class, options, config.model, config.seed)
    return build_model(config.model, objective.processor, objective.auto_class, options, config.seed)


def _with_parts(model: Any, job: Job, objective: Objective) -> Any:
    return select_trainable(model, job.config.objective, job.config.seed, train_head=not objective.has_lm_head)


def equip(model: Any, train: TrainConfig, device: torch.device, precision: str) -> None:
    """Give a model what makes its passes smaller or faster: activation checkpointing, attention, compilation."""
    if train.activation_checkpointing:
        enable_gradient_checkpointing(model)
    if device.type == "cpu" and precision == "bf16":
        enable_blockwise_attention(model)
    if train.compile:  # block by block: all of a stack are one piece of code, compiled once
        for block in (block for blocks in block_lists(model) for block in blocks):
            block.compile()


@torch.no_grad()
def load_weights(model: Any, checkpoint: Checkpoint, kind: str = "weight") -> None:
    """Copy a checkpoint's weights, or their average, into a whole fp32 model. Raises UserError where it is another model's."""
    weights = checkpoint.weights(kind)
    for name, parameter in model.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(
                f"{checkpoint.folder} holds another model ({name} differs): use another name=..., or the model's former options"
            )
        parameter.copy_(weights[name])


def empty_model(job: Job, objective: Objective) -> Any:
    """Make the same model with weights that take no memory: views of a single zero. Its buffers are whole."""
    config = load_or_make_config(job.start, job.config.model, objective.processor, objective.model_options())
    with weightless():
        model = model_from_config(
            config, objective.auto_class, dtype=torch.float32, attn_implementation=job.config.model.attention
        )
    views: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # one that two modules share stays one
                view = nn.Parameter(torch.zeros(()).expand(parameter.shape), parameter.requires_grad)
                module._parameters[name] = views.setdefault(id(parameter), view)
    return model


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Let modules that are made in a block have their parameters on the meta device, where they take no memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def write_mmap(model: nn.Module, file: Path) -> None:
    """Write all that a model holds, each tensor once."""
    save_file({name: tensor.detach().contiguous() for name, tensor in held(model)}, file)


@torch.no_grad()
def attach_mmap(model: nn.Module, file: Path) -> None:
    """Let a model's parameters be views of a file, mapped into memory and read only; its buffers, which stay, are copied."""
    laid = load_file(file)
    for name, parameter in model.named_parameters():
        parameter.data = laid[name]
    for name, buffer in model.named_buffers():
        buffer.data = laid[name].clone()


def held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters and buffers, those that `state_dict` leaves out too."""
    yield from model.named_parameters()
    yield from model.named_buffers()

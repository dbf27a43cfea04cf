"""The initial model of a run. At ZeRO stage 3, where each rank keeps a shard of it, each node holds the full model once."""

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
from engine.models.build import (
    block_lists,
    build_model,
    enable_gradient_checkpointing,
    load_or_make_config,
    load_pretrained,
    model_from_config,
)
from engine.models.trainable import select_trainable
from engine.objectives.contract import Objective
from engine.train.checkpoint import Checkpoint
from engine.train.job import TrainJob
from engine.train.process_group import ProcessGroup

# makes the base model, before parts are added (LoRA, head) or frozen
ModelFactory = Callable[[TrainJob, Objective], Any]


def start_model(
    job: TrainJob,
    objective: Objective,
    group: ProcessGroup,
    checkpoint: Checkpoint | None,
    model_factory: ModelFactory | None = None,
) -> Any:
    """Return the model in fp32 with the weights of the checkpoint, else of the bundle, else random ones from the seed.

    `model_factory` replaces `load_or_init`. At stage 3 with several ranks, one rank per node makes the model and writes it to
    a file that all ranks of the node map into memory: the node holds it once, until each rank has copied its shard.
    """
    shared = job.config.zero.stage == 3 and group.world_size > 1
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    full = make_model(job, objective, checkpoint, model_factory) if is_first or not shared else None
    if not shared:
        return full
    with tempfile.TemporaryDirectory(prefix="manta-") if is_first else contextlib.nullcontext("") as folder:
        if full is not None:
            write_mmap(full, Path(folder) / "start.safetensors")
        own = {"host": np.array(socket.gethostname()), "folder": np.array(folder)}
        writers = [entry for entry in group.all_gather_arrays(own) if entry["folder"].item()]
        node_folder = next(entry["folder"].item() for entry in writers if entry["host"].item() == socket.gethostname())
        model = full if full is not None else _add_trainable_parts(empty_model(job, objective), job, objective)
        attach_mmap(model, Path(node_folder) / "start.safetensors")
        group.barrier()  # the file may be deleted now: its memory stays as long as it is mapped
    return model


def make_model(
    job: TrainJob, objective: Objective, checkpoint: Checkpoint | None = None, model_factory: ModelFactory | None = None
) -> Any:
    """Make the full model: the bundle's weights, else random ones from the seed; then the checkpoint's, if there is one."""
    model = _add_trainable_parts((model_factory or load_or_init)(job, objective), job, objective)
    if checkpoint:
        load_weights(model, checkpoint)
    return model


def load_or_init(job: TrainJob, objective: Objective) -> Any:
    """Load the start bundle's model, else make one with random weights from the seed."""
    config, options = job.config, objective.model_options()
    if job.start_bundle:
        return load_pretrained(job.start_bundle, objective.auto_class, options, config.model, config.seed)
    return build_model(config.model, objective.processor, objective.auto_class, options, config.seed)


def _add_trainable_parts(model: Any, job: TrainJob, objective: Objective) -> Any:
    return select_trainable(model, job.config.objective, job.config.seed, train_head=not objective.has_lm_head)


def apply_optimizations(model: Any, train: TrainConfig, device: torch.device, precision: str) -> None:
    """Apply what saves memory or time in a model: activation checkpointing, blockwise attention, compilation."""
    if train.activation_checkpointing:
        enable_gradient_checkpointing(model)
    if device.type == "cpu" and precision == "bf16":
        enable_blockwise_attention(model)
    if train.compile:  # block by block: the blocks of a stack share one compiled graph
        for block in (block for blocks in block_lists(model) for block in blocks):
            block.compile()


@torch.no_grad()
def load_weights(model: Any, checkpoint: Checkpoint, kind: str = "weight") -> None:
    """Copy a checkpoint's weights, or their moving average, into a full fp32 model. Raises UserError for another model's."""
    weights = checkpoint.weights(kind)
    for name, parameter in model.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(
                f"{checkpoint.folder} holds another model ({name} differs): use another name=..., or the model's former options"
            )
        parameter.copy_(weights[name])


def empty_model(job: TrainJob, objective: Objective) -> Any:
    """Make the model with weights that take no memory (views of a single zero) and real buffers."""
    config = load_or_make_config(job.start_bundle, job.config.model, objective.processor, objective.model_options())
    with meta_parameters():
        model = model_from_config(
            config, objective.auto_class, dtype=torch.float32, attn_implementation=job.config.model.attention
        )
    views: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # a shared parameter stays shared
                view = nn.Parameter(torch.zeros(()).expand(parameter.shape), parameter.requires_grad)
                module._parameters[name] = views.setdefault(id(parameter), view)
    return model


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Put the parameters of modules created in the block on the meta device, where they take no memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def write_mmap(model: nn.Module, file: Path) -> None:
    """Write a model's parameters and buffers to a file, each tensor once."""
    save_file({name: tensor.detach().contiguous() for name, tensor in named_tensors(model)}, file)


@torch.no_grad()
def attach_mmap(model: nn.Module, file: Path) -> None:
    """Make a model's parameters read-only views of a memory-mapped file, and copy its buffers from there."""
    tensors = load_file(file)
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]
    for name, buffer in model.named_buffers():
        buffer.data = tensors[name].clone()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters and buffers, including the buffers that `state_dict` leaves out."""
    yield from model.named_parameters()
    yield from model.named_buffers()

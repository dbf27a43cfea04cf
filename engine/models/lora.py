"""Low-rank adaptation (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685), with peft: adding, merging, writing an adapter.

Each linear layer of the transformer blocks, W [O, I], gets two low-rank matrices, B [O, R] and A [R, I], and computes
(W + alpha / R x B A) x. Only these are trained, and the task's own head if it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.atomic_write import atomic_folder
from engine.config import LoraConfig
from engine.errors import UserError
from engine.models.build import embedding_modules, transformer_blocks

ADAPTER = "default"  # peft's name for the only adapter


def add_lora(model: nn.Module, lora: LoraConfig, seed: int, train_head: bool) -> None:
    """Add the matrices, A from the seed and B zero, so that the outputs do not change, and freeze all other parameters.

    `train_head`: parameters outside blocks and embeddings are trained too. Raises UserError if no layer matches lora.targets,
    or if peft is missing.
    """
    if lora.rank == 0:
        return
    peft = _import_peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(lora, find_target_layers(model, lora.targets)), model, ADAPTER)
    modules = (*embedding_modules(model), *transformer_blocks(model))
    base_parameters = {id(p) for module in modules for p in module.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or (train_head and id(parameter) not in base_parameters))


def find_target_layers(model: nn.Module, suffixes: list[str]) -> list[str]:
    """Return the paths of the blocks' linear layers whose names end in one of `suffixes` (all if there are none)."""
    from transformers.pytorch_utils import Conv1D

    in_blocks = {id(layer) for block in transformer_blocks(model) for layer in block.modules()}
    linear = [
        name
        for name, layer in model.named_modules()
        if id(layer) in in_blocks and isinstance(layer, (nn.Linear, Conv1D))
    ]
    for suffix in suffixes:
        if not any(_has_suffix(name, suffix) for name in linear):
            available = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(
                f"objective.lora.targets: no block has a linear layer '{suffix}'; this model has {available}"
            )
    return [name for name in linear if not suffixes or any(_has_suffix(name, suffix) for suffix in suffixes)]


def _has_suffix(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def merge_lora(model: nn.Module) -> None:
    """Add the product of the matrices to the weights, and remove the adapter layers."""
    for parent, name, layer in list(_lora_layers(model)):
        layer.merge(adapter_names=[ADAPTER])
        setattr(parent, name, layer.get_base_layer())
    model.requires_grad_(True)


def write_adapter(model: Any, lora: LoraConfig, base: str | None, folder: Path, task_type: str | None = None) -> None:
    """Write the trained parameters as peft loads them (adapter_config.json, adapter_model.safetensors), atomically.

    `task_type` is peft's. Nothing is written if a trained parameter belongs to the model itself, not to one of its modules
    (CLIP's temperature): peft only saves whole modules.
    """
    from safetensors.torch import save_file

    peft = _import_peft()
    paths = {id(module): path for path, module in model.named_modules()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    modules_to_save = sorted({name.rpartition(".")[0] for name in trained if ".lora_" not in name})
    if "" in modules_to_save:
        return
    target_modules = [paths[id(layer)] for _, _, layer in _lora_layers(model)]
    config = _peft_config(lora, target_modules)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save, config.target_modules = modules_to_save or None, sorted(target_modules)
    config.task_type = task_type
    tensors = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": p.detach().contiguous() for name, p in trained.items()}  # fmt: skip
    with atomic_folder(folder) as part:
        save_file(tensors, part / peft.utils.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(part)


def _lora_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield (parent, name, layer) of each layer with LoRA matrices."""
    from peft.tuners.lora import LoraLayer

    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, LoraLayer):
                yield parent, name, layer


def _peft_config(lora: LoraConfig, paths: list[str]) -> Any:
    return _import_peft().LoraConfig(
        r=lora.rank, lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha, lora_dropout=lora.dropout,
        target_modules=paths,
    )  # fmt: skip


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("objective.lora needs the package peft: pip install 'manta-train[lora]'") from error
    return peft

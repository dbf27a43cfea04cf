"""Low-rank adaptation (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685), by peft: what it adds, merges and leaves as files.

Of a model the linear layers of the blocks, W [O, I], get two small matrices beside them, B [O, R] and A [R, I], and give
(W + alpha / R x B A) x. Only these are trained, and what stands behind the blocks where the task has a head of its own.
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

ADAPTER = "default"  # peft's name for the only one


def add_lora(model: nn.Module, lora: LoraConfig, seed: int, train_head: bool) -> None:
    """Add the matrices, A from the seed and B zero, so that the model gives what it gave; and freeze what isn't trained.

    `head`: what is neither a block nor an embedding is trained too. Raises UserError where no layer is one of lora.targets,
    or peft is missing.
    """
    if lora.rank == 0:
        return
    peft = _peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(lora, find_target_layers(model, lora.targets)), model, ADAPTER)
    kept = {id(p) for part in (*embedding_modules(model), *transformer_blocks(model)) for p in part.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or (train_head and id(parameter) not in kept))


def find_target_layers(model: nn.Module, asked: list[str]) -> list[str]:
    """Return the paths of the linear layers of the blocks whose names end as is asked (nothing: all of them)."""
    from transformers.pytorch_utils import Conv1D

    blocks = {id(layer) for block in transformer_blocks(model) for layer in block.modules()}
    linear = [
        name for name, layer in model.named_modules() if id(layer) in blocks and isinstance(layer, (nn.Linear, Conv1D))
    ]
    for end in asked:
        if not any(_ends(name, end) for name in linear):
            there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(f"objective.lora.targets: no block has a linear layer '{end}'; this model has {there}")
    return [name for name in linear if not asked or any(_ends(name, end) for end in asked)]


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")


def merge_lora(model: nn.Module) -> None:
    """Add the matrices' product to the weights, and leave the model as it was without them."""
    for parent, name, layer in list(_adapted(model)):
        layer.merge(adapter_names=[ADAPTER])
        setattr(parent, name, layer.get_base_layer())
    model.requires_grad_(True)


def write_adapter(model: Any, lora: LoraConfig, base: str | None, folder: Path) -> None:
    """Write the trained part as peft reads it (adapter_config.json, adapter_model.safetensors), renamed into place last.

    A model with a trained parameter that is no module's (CLIP's temperature) gets none: peft keeps whole modules only.
    """
    from safetensors.torch import save_file

    peft = _peft()
    paths = {id(module): path for path, module in model.named_modules()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = sorted({name.rpartition(".")[0] for name in trained if ".lora_" not in name})
    if "" in whole:
        return
    adapted = [paths[id(layer)] for _, _, layer in _adapted(model)]
    config = _peft_config(lora, adapted)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save, config.target_modules = whole or None, sorted(adapted)
    config.task_type = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}.get(
        next((end for end in ("ForCausalLM", "ForSequenceClassification") if type(model).__name__.endswith(end)), "")
    )
    tensors = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": p.detach().contiguous() for name, p in trained.items()}  # fmt: skip
    with atomic_folder(folder) as part:
        save_file(tensors, part / peft.utils.SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(part)


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield (parent, name, layer) of each layer that has matrices beside its weight."""
    from peft.tuners.lora import LoraLayer

    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, LoraLayer):
                yield parent, name, layer


def _peft_config(lora: LoraConfig, paths: list[str]) -> Any:
    return _peft().LoraConfig(
        r=lora.rank, lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha, lora_dropout=lora.dropout,
        target_modules=paths,
    )  # fmt: skip


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("objective.lora needs a package that isn't here: pip install 'manta-train[lora]'") from error
    return peft

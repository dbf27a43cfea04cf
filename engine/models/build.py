"""Build a transformers module from `model.*`, or load one from a folder; the same weights whatever the layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config import ModelConfig
from engine.errors import UserError, nearest

# Options of ours that aren't fields of a transformers config.
OURS = {"type", "options", "attention", "dropout"}


def transformers_config(model: ModelConfig, tokenizer: Any, options: dict[str, Any]) -> Any:
    """Return the transformers config for `model`, with the tokenizer's special ids and the task's `options`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if model.type not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"model.type={model.type} is no architecture of transformers{nearest(model.type, CONFIG_MAPPING_NAMES)}"
        )
    kind = CONFIG_MAPPING[model.type]
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in OURS}
    given = {name: value for name, value in given.items() if value is not None} | dict(model.options)
    known = {*vars(kind()), *kind.attribute_map}
    for name in given:
        if name not in known:
            raise UserError(f"model.{name} is no option of {kind.__name__}{nearest(name, known)}")
    given.setdefault("vocab_size", len(tokenizer))
    if given["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.vocab_size {given['vocab_size']:,} is less than the tokenizer's {len(tokenizer):,}: leave model.vocab_size out"
        )
    given |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    given |= {"bos_token_id": tokenizer.bos_token_id, **options}
    return set_dropout(kind(**given), model)


def set_dropout(config: Any, model: ModelConfig) -> Any:
    """Set every dropout of a transformers config to model.dropout (many have 0.1), but for those in model.options."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, (int, float)) and name not in model.options:
            setattr(config, name, model.dropout)
    return config


def build(model: ModelConfig, tokenizer: Any, auto_class: str, options: dict[str, Any], seed: int) -> nn.Module:
    """Make a model with fresh fp32 weights that depend on the seed alone."""
    import transformers

    config = transformers_config(model, tokenizer, options)
    torch.manual_seed(seed)
    built: nn.Module = getattr(transformers, auto_class).from_config(
        config, dtype=torch.float32, attn_implementation=model.attention
    )
    return built


def load(folder: Path, auto_class: str, options: dict[str, Any], model: ModelConfig, seed: int) -> nn.Module:
    """Load fp32 weights from a Hugging Face folder; a head that it lacks gets fresh weights from the seed."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    kind = getattr(transformers, auto_class)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options)
        loaded: nn.Module = kind.from_pretrained(
            folder, config=set_dropout(config, model), dtype=torch.float32, attn_implementation=model.attention,
            ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no model that {auto_class} can load: {str(error).splitlines()[0]}") from error
    return loaded


def freeze_layers(model: nn.Module, layers: int) -> None:
    """Keep the embeddings and the first `layers` blocks as they are; 0 freezes nothing."""
    if layers == 0:
        return
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    if layers > len(blocks):
        raise UserError(
            f"objective.frozen_layers {layers} is more than the model's {len(blocks)} blocks: use {len(blocks)} or less"
        )
    for part in (model.get_input_embeddings(), *blocks[:layers]):  # type: ignore[operator]
        part.requires_grad_(False)

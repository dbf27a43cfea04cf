"""Modules of diffusers that tell the noise in an image: fresh ones from `model.*`, or those of a folder.

Their config is a dict, as it is in diffusers' own config.json, with the module's class under "_class_name".
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.errors import UserError, nearest

TYPES = {"dit": "DiTTransformer2DModel"}  # model.type -> class of diffusers
NAMES = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads"}  # of ModelConfig, in a DiT
LABELS = "num_embeds_ada_norm"  # the option that sizes the tables of labels


def diffusers() -> Any:
    """Return the package. Raises UserError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError("making images needs the package diffusers: pip install 'manta-train[diffusion]'") from error
    diffusers.utils.logging.set_verbosity_error()  # it warns of every change of precision
    return diffusers


def is_denoiser(folder: Path) -> bool:
    """Tell whether a folder holds a module of diffusers."""
    return "_class_name" in json.loads((folder / "config.json").read_text())


def denoiser_config(model: ModelConfig, image_size: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the config of `model` for images of image_size pixels, with the task's `options`. Raises UserError."""
    name = TYPES[model.type]
    known = set(inspect.signature(getattr(diffusers(), name).__init__).parameters) - {"self"}
    told = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.default is None}
    told = {key: value for key, value in told.items() if value is not None}
    given = {NAMES[key]: told.pop(key) for key in NAMES if key in told}
    if width := told.pop("hidden_size", None):
        if "num_attention_heads" not in given:
            raise UserError(f"model.hidden_size {width} is shared out among heads: say model.num_attention_heads too")
        given["attention_head_dim"] = width // given["num_attention_heads"]
    for key in (*told, *model.options):
        if key not in known:
            raise UserError(f"model.{key} is no option of {name}{nearest(key, known)}")
    if model.attention != "sdpa":
        raise UserError(f"model.attention={model.attention} is not for model.type={model.type}: leave it out")
    size = {"sample_size": image_size} if image_size else {}
    return {"_class_name": name, **size, **given, **model.options, "dropout": model.dropout, **options}


def read_config(folder: Path, model: ModelConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the module in a folder, with our dropout and the task's `options`."""
    return json.loads((folder / "config.json").read_text()) | {"dropout": model.dropout} | options


def make_denoiser(config: dict[str, Any]) -> nn.Module:
    """Make a module of a config, with its weights as its authors begin: each block leaves what it reads as it is."""
    made: nn.Module = getattr(diffusers(), config["_class_name"]).from_config(config)
    for name, parameter in made.named_parameters():  # adaLN-Zero: Peebles & Xie 2023, https://arxiv.org/abs/2212.09748
        if ".norm1.linear." in name or name.startswith("proj_out_"):
            nn.init.zeros_(parameter)
        elif ".norm1.emb." in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return keep_labels(made)


def keep_labels(model: nn.Module) -> nn.Module:
    """Let a module show every label that it is given: the task drops some, by a rule that no layout changes."""
    for module in model.modules():
        if hasattr(module, "token_drop"):
            module.dropout_prob = 0.0  # type: ignore[assignment]
    return model


def load_denoiser(folder: Path, config: dict[str, Any], seed: int) -> nn.Module:
    """Make a module of a config with a folder's weights in fp32; tables of another number of labels are fresh, from the seed.

    Raises UserError where the folder's weights are another module's.
    """
    torch.manual_seed(seed)
    model, there = make_denoiser(config), weights_in(folder)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in there or (there[name].shape != tensor.shape and "embedding_table" not in name):
            raise UserError(f"{folder} holds no weights of its {config['_class_name']} ({name}): it is not whole")
        if there[name].shape == tensor.shape:
            own[name] = there[name].float()
    model.load_state_dict(own)
    return model


def open_denoiser(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """Load the module in a folder for use, in its own precision or in `dtype`."""
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    found = next(iter(weights_in(folder).values())).dtype if dtype is None else dtype
    model: nn.Module = getattr(diffusers(), name).from_pretrained(
        folder, torch_dtype=found, local_files_only=True, use_safetensors=True
    )
    return keep_labels(model)


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in a folder's safetensors files, mapped into memory."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

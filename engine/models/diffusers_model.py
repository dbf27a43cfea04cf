"""The transformers of diffusers, which predict the noise in an image: made from `model.*`, or loaded from a folder.

Their config is a dict, as in diffusers' own config.json, with the class name under "_class_name".
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
from engine.errors import UserError, did_you_mean

MODEL_CLASSES = {"dit": "DiTTransformer2DModel"}  # model.type -> class of diffusers
FIELD_NAMES = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads"}  # ModelConfig -> DiT
NUM_LABELS_FIELD = "num_embeds_ada_norm"  # the field of a DiT's config that sizes the label embeddings


def import_diffusers() -> Any:
    """Return the package diffusers. Raises UserError if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "generating images needs the package diffusers: pip install 'manta-train[diffusion]'"
        ) from error
    diffusers.utils.logging.set_verbosity_error()  # it warns at every change of dtype
    return diffusers


def is_diffusers_folder(folder: Path) -> bool:
    """Tell whether a folder holds a model of diffusers."""
    return "_class_name" in json.loads((folder / "config.json").read_text())


def make_diffusers_config(model: ModelConfig, image_size: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the config of `model` for images of image_size pixels, with the task's `options`. Raises UserError."""
    class_name = MODEL_CLASSES[model.type]
    known = set(inspect.signature(getattr(import_diffusers(), class_name).__init__).parameters) - {"self"}
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.default is None}
    given = {name: value for name, value in given.items() if value is not None}
    fields = {FIELD_NAMES[name]: given.pop(name) for name in FIELD_NAMES if name in given}
    if width := given.pop("hidden_size", None):
        if "num_attention_heads" not in fields:
            raise UserError(
                f"model.hidden_size {width} is divided among the attention heads: set model.num_attention_heads too"
            )
        fields["attention_head_dim"] = width // fields["num_attention_heads"]
    for name in (*given, *model.options):
        if name not in known:
            raise UserError(f"model.{name} is no option of {class_name}{did_you_mean(name, known)}")
    if model.attention != "sdpa":
        raise UserError(f"model.attention={model.attention} is not for model.type={model.type}: leave it out")
    size = {"sample_size": image_size} if image_size else {}
    return {"_class_name": class_name, **size, **fields, **model.options, "dropout": model.dropout, **options}


def read_diffusers_config(folder: Path, model: ModelConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the model in a folder, with `model.dropout` and the task's `options`."""
    return json.loads((folder / "config.json").read_text()) | {"dropout": model.dropout} | options


def create_diffusers_model(config: dict[str, Any]) -> nn.Module:
    """Make a model from a config with adaLN-Zero weights: each block starts as the identity."""
    model: nn.Module = getattr(import_diffusers(), config["_class_name"]).from_config(config)
    for name, parameter in model.named_parameters():  # Peebles & Xie 2023, https://arxiv.org/abs/2212.09748
        if ".norm1.linear." in name or name.startswith("proj_out_"):
            nn.init.zeros_(parameter)
        elif ".norm1.emb." in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return disable_label_dropout(model)


def disable_label_dropout(model: nn.Module) -> nn.Module:
    """Disable the model's own label dropout: the task drops labels itself, independently of the layout."""
    for module in model.modules():
        if hasattr(module, "token_drop"):
            module.dropout_prob = 0.0  # type: ignore[assignment]
    return model


def load_diffusers_model(folder: Path, config: dict[str, Any], seed: int) -> nn.Module:
    """Make a model from a config with a folder's weights in fp32; label embeddings of another size are initialized from the seed.

    Raises UserError if the folder lacks some of its weights, or has them in other shapes.
    """
    torch.manual_seed(seed)
    model, tensors = create_diffusers_model(config), read_tensors(folder)
    state = model.state_dict()
    for name, tensor in state.items():
        if name not in tensors or (tensors[name].shape != tensor.shape and "embedding_table" not in name):
            raise UserError(f"{folder} holds no weights of its {config['_class_name']} ({name}): it is not complete")
        if tensors[name].shape == tensor.shape:
            state[name] = tensors[name].float()
    model.load_state_dict(state)
    return model


def open_diffusers_model(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """Load the model in a folder for inference, in its own dtype or in `dtype`."""
    class_name = json.loads((folder / "config.json").read_text())["_class_name"]
    torch_dtype = next(iter(read_tensors(folder).values())).dtype if dtype is None else dtype
    model: nn.Module = getattr(import_diffusers(), class_name).from_pretrained(
        folder, torch_dtype=torch_dtype, local_files_only=True, use_safetensors=True
    )
    return disable_label_dropout(model)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in a folder's safetensors files, memory-mapped."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

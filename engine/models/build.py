"""Build a module from `model.*`, or load one from a folder; the same weights whatever the layout.

It is one of transformers, or for tasks whose `auto_class` says so one of diffusers (denoisers.py), whose config is a dict.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config import ModelConfig
from engine.errors import UserError, nearest
from engine.models.denoisers import (
    TYPES,
    denoiser_config,
    is_denoiser,
    load_denoiser,
    make_denoiser,
    open_denoiser,
    read_config,
)

DIFFUSERS = "diffusers."  # begins an auto_class that isn't of transformers
# Of Whisper's encoder (Radford et al. 2022, section 2.2): a frame of a spectrogram every 10 ms, and a position for two.
STRIDE, POSITIONS_A_SECOND = 2, 50
# Options of ours that aren't fields of a transformers config.
OURS = {"type", "options", "attention", "dropout"}


@dataclass(frozen=True)
class Inputs:
    """What a model is fed with, as far as it decides the model's shape. None: not known, or nothing of the kind."""

    vocab_size: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    image_size: int | None = None  # pixels
    num_mel_bins: int | None = None  # of a sound's spectrogram
    max_source_positions: int | None = None  # that a window of sound has after an encoder's convolutions

    @classmethod
    def of(cls, processor: Any) -> Inputs:
        """Read them from transformers' tokenizer, image processor, feature extractor, or a processor that holds two."""
        if isinstance(processor, Inputs):
            return processor
        tokenizer = getattr(processor, "tokenizer", processor)
        images = getattr(processor, "image_processor", processor)
        known: dict[str, Any] = {}
        if hasattr(tokenizer, "pad_token_id"):
            known = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
            known["vocab_size"] = len(tokenizer)
        if hasattr(images, "image_mean"):
            size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
            known["image_size"] = getattr(size, "height", None)
        sounds = getattr(processor, "feature_extractor", processor)
        if frames := getattr(sounds, "nb_max_frames", None):
            known |= {"num_mel_bins": sounds.feature_size, "max_source_positions": frames // STRIDE}
        return cls(**known)


def config_of(model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the config of `model` in its library, with what the processor decides of it and the task's `options`."""
    if model.type in TYPES:
        return denoiser_config(model, Inputs.of(processor).image_size, options)
    return transformers_config(model, processor, options)


def transformers_config(model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the transformers config for `model`, with what the processor decides of it and the task's `options`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if model.type not in CONFIG_MAPPING_NAMES:
        known = (*CONFIG_MAPPING_NAMES, *TYPES)
        raise UserError(f"model.type={model.type} is no architecture of transformers{nearest(model.type, known)}")
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in OURS}
    given = {name: value for name, value in given.items() if value is not None} | dict(model.options)
    made = _made(CONFIG_MAPPING[model.type], given, Inputs.of(processor), options)
    return set_dropout(made, model)


def _made(kind: Any, given: dict[str, Any], inputs: Inputs, options: dict[str, Any]) -> Any:
    """Make a config of class `kind` from what is `given`; `inputs` go to whichever of it and its nested configs has such fields."""
    known = {*vars(kind()), *kind.attribute_map}
    for name in given:
        if name not in known:
            within = f": {kind.__name__} has them in model.options" if kind.sub_configs else ""
            raise UserError(f"model.{name} is no option of {kind.__name__}{within}{nearest(name, known)}")
    for name, part in kind.sub_configs.items():
        given = given | {name: _made(part, dict(given.get(name) or {}), inputs, {})}
    told = {name: value for name, value in vars(inputs).items() if name in known and value is not None}
    if "vocab_size" in known:
        told |= {name: getattr(inputs, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if (vocabulary := given.get("vocab_size")) and inputs.vocab_size and vocabulary < inputs.vocab_size:
        raise UserError(
            f"model.vocab_size {vocabulary:,} is less than the tokenizer's {inputs.vocab_size:,}: leave model.vocab_size out"
        )
    if (side := given.get("image_size")) and inputs.image_size and side != inputs.image_size:
        raise UserError(
            f"model.image_size {side} is not that of the images, {inputs.image_size}: leave it out, and set data.image_size"
        )
    # By the config's own names: what it derives in its making (T5's decoder layers) is else derived from its defaults.
    return kind(**{kind.attribute_map.get(name, name): value for name, value in (told | given | options).items()})


def set_dropout(config: Any, model: ModelConfig) -> Any:
    """Set every dropout of a transformers config and those in it to model.dropout (many have 0.1), but for those in model.options."""
    _set_dropout(config, model.dropout, model.options)
    return config


def _set_dropout(config: Any, dropout: float, given: Any) -> None:
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, (int, float)) and name not in given:
            setattr(config, name, dropout)
        elif name in config.sub_configs and value is not None:
            _set_dropout(value, dropout, given.get(name) or {})


def build(model: ModelConfig, processor: Any, auto_class: str, options: dict[str, Any], seed: int) -> nn.Module:
    """Make a model with fresh fp32 weights that depend on the seed alone."""
    config = config_of(model, processor, options)
    torch.manual_seed(seed)
    return from_config(config, auto_class, dtype=torch.float32, attn_implementation=model.attention)


def from_config(config: Any, auto_class: str, **options: Any) -> nn.Module:
    """Make the model of a config; `options` are for transformers. Raises UserError where the architecture is not for the task."""
    check_library(config, auto_class)
    if isinstance(config, dict):
        return make_denoiser(config)
    import transformers

    kind = getattr(transformers, auto_class)
    if type(config) not in kind._model_mapping:
        raise _not_for_the_task(config.model_type, auto_class)
    made: nn.Module = kind.from_config(config, **options)
    return made


def check_library(config: Any, auto_class: str) -> None:
    """Raise UserError where a config is of another library than the task, or of another class of diffusers."""
    if isinstance(config, dict) and auto_class != DIFFUSERS + config["_class_name"]:
        raise _not_for_the_task(config["_class_name"], auto_class)
    if not isinstance(config, dict) and auto_class.startswith(DIFFUSERS):
        raise _not_for_the_task(config.model_type, auto_class)


def _not_for_the_task(what: str, auto_class: str) -> UserError:
    library = "diffusers" if auto_class.startswith(DIFFUSERS) else "transformers"
    return UserError(
        f"model.type={what} is not for this objective ({library} has no {auto_class.removeprefix(DIFFUSERS)} of it): "
        "use another model=... or another objective=..."
    )


def shape_of(folder: Path | None, model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the config of the bundle in `folder`, or else that of `model`, with the task's `options`."""
    if folder is None:
        return config_of(model, processor, options)
    if is_denoiser(folder):
        return read_config(folder, model, options)
    import transformers

    return set_dropout(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options), model)


def load(folder: Path, auto_class: str, options: dict[str, Any], model: ModelConfig, seed: int) -> nn.Module:
    """Load fp32 weights from a Hugging Face folder; a head that it lacks gets fresh weights from the seed."""
    shape = shape_of(folder, model, None, options)
    check_library(shape, auto_class)
    if isinstance(shape, dict):
        return load_denoiser(folder, shape, seed)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    kind = getattr(transformers, auto_class)
    try:
        with without_warnings():  # a head that is made anew is no news
            loaded: nn.Module = kind.from_pretrained(
                folder, config=shape, dtype=torch.float32, attn_implementation=model.attention,
                ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no model that {auto_class} can load: {str(error).splitlines()[0]}") from error
    return loaded


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Have transformers tell of errors only, during a block."""
    import transformers

    told = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(told)


def open_model(folder: Path, auto_class: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Load the model in a folder for use, in its own precision or in `dtype`."""
    if auto_class.startswith(DIFFUSERS):
        return open_denoiser(folder, dtype).eval()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: nn.Module = getattr(transformers, auto_class).from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
    )
    return loaded.eval()


def recompute_activations(model: Any) -> None:
    """Let a model compute its activations again in the backward pass, which its library calls gradient checkpointing."""
    named = "gradient_checkpointing_enable"
    getattr(model, named if hasattr(model, named) else "enable_gradient_checkpointing")()


def embedding_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules that turn inputs into the first block's: of tokens, positions, patches."""
    return [m for m in model.modules() if isinstance(m, nn.Embedding) or m.__class__.__name__.endswith("Embeddings")]


def block_parts(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of all stacks."""
    return [block for blocks in stacks_of(model) for block in blocks]


def stacks_of(model: nn.Module) -> list[nn.ModuleList]:
    """Return the stacks of blocks of a model: its lists of modules that are in no other list."""
    if isinstance(model, nn.ModuleList):
        return [model]
    return [found for child in model.children() for found in stacks_of(child)]

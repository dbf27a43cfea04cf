"""Build a transformers module from `model.*`, or load one from a folder; the same weights whatever the layout."""

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


def transformers_config(model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the transformers config for `model`, with what the processor decides of it and the task's `options`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if model.type not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"model.type={model.type} is no architecture of transformers{nearest(model.type, CONFIG_MAPPING_NAMES)}"
        )
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
    config = transformers_config(model, processor, options)
    torch.manual_seed(seed)
    return from_config(config, auto_class, dtype=torch.float32, attn_implementation=model.attention)


def from_config(config: Any, auto_class: str, **options: Any) -> nn.Module:
    """Make the model of a transformers config. Raises UserError where the architecture is not for the task."""
    import transformers

    kind = getattr(transformers, auto_class)
    if type(config) not in kind._model_mapping:
        raise UserError(
            f"model.type={config.model_type} is not for this objective (transformers has no {auto_class} of it): "
            "use another model=... or another objective=..."
        )
    made: nn.Module = kind.from_config(config, **options)
    return made


def shape_of(folder: Path | None, model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the transformers config of the bundle in `folder`, or else that of `model`, with the task's `options`."""
    if folder is None:
        return transformers_config(model, processor, options)
    import transformers

    return set_dropout(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options), model)


def load(folder: Path, auto_class: str, options: dict[str, Any], model: ModelConfig, seed: int) -> nn.Module:
    """Load fp32 weights from a Hugging Face folder; a head that it lacks gets fresh weights from the seed."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    kind = getattr(transformers, auto_class)
    try:
        with without_warnings():  # a head that is made anew is no news
            loaded: nn.Module = kind.from_pretrained(
                folder, config=shape_of(folder, model, None, options), dtype=torch.float32, attn_implementation=model.attention,
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

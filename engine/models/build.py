"""Build a model from `model.*`, or load one from a folder; its weights do not depend on the layout.

Models are transformers', or, if the task's `auto_class` says so, diffusers' (diffusers_model.py), whose config is a dict.
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
from engine.errors import UserError, did_you_mean
from engine.models.diffusers_model import (
    MODEL_CLASSES,
    create_diffusers_model,
    is_diffusers_folder,
    load_diffusers_model,
    make_diffusers_config,
    open_diffusers_model,
    read_diffusers_config,
)

DIFFUSERS_PREFIX = "diffusers."  # of an auto_class that is a class of diffusers
# Whisper's encoder (Radford et al. 2022, section 2.2): a spectrogram frame every 10 ms, and a position for every two frames.
ENCODER_STRIDE, POSITIONS_PER_SECOND = 2, 50
# Fields of ModelConfig that are not fields of a transformers config.
NOT_IN_TRANSFORMERS = {"type", "options", "attention", "dropout"}


@dataclass(frozen=True)
class InputSpec:
    """The properties of the inputs that determine a model's shape; None if unknown, or not an input of this kind."""

    vocab_size: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    image_size: int | None = None  # pixels
    num_mel_bins: int | None = None  # of a spectrogram
    max_source_positions: int | None = None  # of a window of audio, after the encoder's convolutions

    @classmethod
    def from_processor(cls, processor: Any) -> InputSpec:
        """Read them from transformers' tokenizer, image processor, feature extractor, or a processor that holds two of these."""
        if isinstance(processor, InputSpec):
            return processor
        tokenizer = getattr(processor, "tokenizer", processor)
        image_processor = getattr(processor, "image_processor", processor)
        fields: dict[str, Any] = {}
        if hasattr(tokenizer, "pad_token_id"):
            fields = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
            fields["vocab_size"] = len(tokenizer)
        if hasattr(image_processor, "image_mean"):
            crops = getattr(image_processor, "do_center_crop", False)
            size = image_processor.crop_size if crops else image_processor.size
            fields["image_size"] = getattr(size, "height", None)
        feature_extractor = getattr(processor, "feature_extractor", processor)
        if frames := getattr(feature_extractor, "nb_max_frames", None):
            fields |= {
                "num_mel_bins": feature_extractor.feature_size,
                "max_source_positions": frames // ENCODER_STRIDE,
            }
        return cls(**fields)


def make_config(model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the library's config of `model`, with what the processor determines and the task's `options`."""
    if model.type in MODEL_CLASSES:
        return make_diffusers_config(model, InputSpec.from_processor(processor).image_size, options)
    return transformers_config(model, processor, options)


def transformers_config(model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the transformers config of `model`, with what the processor determines and the task's `options`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if model.type not in CONFIG_MAPPING_NAMES:
        known = (*CONFIG_MAPPING_NAMES, *MODEL_CLASSES)
        raise UserError(f"model.type={model.type} is no architecture of transformers{did_you_mean(model.type, known)}")
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in NOT_IN_TRANSFORMERS}
    given = {name: value for name, value in given.items() if value is not None} | dict(model.options)
    config = _make_config(CONFIG_MAPPING[model.type], given, InputSpec.from_processor(processor), options)
    return set_dropout(config, model)


def _make_config(config_class: Any, given: dict[str, Any], spec: InputSpec, options: dict[str, Any]) -> Any:
    """Make a config from `given` fields; fields of `spec` are set wherever the config or a nested config has them."""
    known = {*vars(config_class()), *config_class.attribute_map}
    for name in given:
        if name not in known:
            hint = f": {config_class.__name__} has them in model.options" if config_class.sub_configs else ""
            raise UserError(f"model.{name} is no option of {config_class.__name__}{hint}{did_you_mean(name, known)}")
    for name, sub_class in config_class.sub_configs.items():
        given = given | {name: _make_config(sub_class, dict(given.get(name) or {}), spec, {})}
    from_spec = {name: value for name, value in vars(spec).items() if name in known and value is not None}
    if "vocab_size" in known:
        from_spec |= {name: getattr(spec, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if (vocab_size := given.get("vocab_size")) and spec.vocab_size and vocab_size < spec.vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size:,} is less than the tokenizer's {spec.vocab_size:,}: leave model.vocab_size out"
        )
    if (side := given.get("image_size")) and spec.image_size and side != spec.image_size:
        raise UserError(
            f"model.image_size {side} is not that of the images, {spec.image_size}: leave it out, and set data.image_size"
        )
    # By the config's own names: fields that its constructor derives (T5's decoder layers) must be derived from these values.
    fields = from_spec | given | options
    return config_class(**{config_class.attribute_map.get(name, name): value for name, value in fields.items()})


def set_dropout(config: Any, model: ModelConfig) -> Any:
    """Set each dropout of a transformers config and its nested configs to model.dropout, unless model.options sets it."""
    _set_dropout(config, model.dropout, model.options)
    return config


def _set_dropout(config: Any, dropout: float, given: Any) -> None:
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, (int, float)) and name not in given:
            setattr(config, name, dropout)
        elif name in config.sub_configs and value is not None:
            _set_dropout(value, dropout, given.get(name) or {})


def build_model(model: ModelConfig, processor: Any, auto_class: str, options: dict[str, Any], seed: int) -> nn.Module:
    """Build a model with newly initialized fp32 weights that depend on the seed alone."""
    config = make_config(model, processor, options)
    torch.manual_seed(seed)
    return model_from_config(config, auto_class, dtype=torch.float32, attn_implementation=model.attention)


def model_from_config(config: Any, auto_class: str, **options: Any) -> nn.Module:
    """Build the model of a config; `options` are for transformers. Raises UserError if the architecture is not for the task."""
    check_auto_class(config, auto_class)
    if isinstance(config, dict):
        return create_diffusers_model(config)
    import transformers

    model_class = getattr(transformers, auto_class)
    if type(config) not in model_class._model_mapping:
        raise _unsupported_by_task(config.model_type, auto_class)
    model: nn.Module = model_class.from_config(config, **options)
    return model


def check_auto_class(config: Any, auto_class: str) -> None:
    """Raise UserError if a config is of another library than the task's, or of another class of diffusers."""
    if isinstance(config, dict) and auto_class != DIFFUSERS_PREFIX + config["_class_name"]:
        raise _unsupported_by_task(config["_class_name"], auto_class)
    if not isinstance(config, dict) and auto_class.startswith(DIFFUSERS_PREFIX):
        raise _unsupported_by_task(config.model_type, auto_class)


def _unsupported_by_task(model_type: str, auto_class: str) -> UserError:
    library = "diffusers" if auto_class.startswith(DIFFUSERS_PREFIX) else "transformers"
    return UserError(
        f"model.type={model_type} is not for this objective ({library} has no {auto_class.removeprefix(DIFFUSERS_PREFIX)} of it): "
        "use another model=... or another objective=..."
    )


def load_or_make_config(folder: Path | None, model: ModelConfig, processor: Any, options: dict[str, Any]) -> Any:
    """Return the config of the bundle in `folder`, or if there is none that of `model`, with the task's `options`."""
    if folder is None:
        return make_config(model, processor, options)
    if is_diffusers_folder(folder):
        return read_diffusers_config(folder, model, options)
    import transformers

    return set_dropout(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options), model)


def load_pretrained(folder: Path, auto_class: str, options: dict[str, Any], model: ModelConfig, seed: int) -> nn.Module:
    """Load fp32 weights from a Hugging Face folder; a head that it lacks is initialized from the seed."""
    config = load_or_make_config(folder, model, None, options)
    check_auto_class(config, auto_class)
    if isinstance(config, dict):
        return load_diffusers_model(folder, config, seed)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model_class = getattr(transformers, auto_class)
    try:
        with quiet_transformers():  # it warns of a newly initialized head
            loaded: nn.Module = model_class.from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation=model.attention,
                ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no model that {auto_class} can load: {str(error).splitlines()[0]}") from error
    return loaded


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors only, within a block."""
    import transformers

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def load_for_inference(folder: Path, auto_class: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Load the model in a folder in evaluation mode, in its own dtype or in `dtype`."""
    if auto_class.startswith(DIFFUSERS_PREFIX):
        return open_diffusers_model(folder, dtype).eval()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: nn.Module = getattr(transformers, auto_class).from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
    )
    return loaded.eval()


def enable_gradient_checkpointing(model: Any) -> None:
    """Make a model of transformers or diffusers recompute its activations in the backward pass."""
    method = "gradient_checkpointing_enable"
    getattr(model, method if hasattr(model, method) else "enable_gradient_checkpointing")()


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that embed the inputs: tokens, positions, patches."""
    return [m for m in model.modules() if isinstance(m, nn.Embedding) or m.__class__.__name__.endswith("Embeddings")]


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of all stacks."""
    return [block for blocks in block_lists(model) for block in blocks]


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """Return the blocks of each stack of a model: its outermost module lists."""
    if isinstance(model, nn.ModuleList):
        return [model]
    return [blocks for child in model.children() for blocks in block_lists(child)]

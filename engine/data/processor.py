"""Processors in the Hugging Face layout: a tokenizer, a preprocessor, or one processor that holds both.

A preprocessor makes arrays of images or sounds: an image processor or a feature extractor.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.data.manifest import PROCESSOR_FOLDER, TOKENIZER_FOLDER
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError

IMAGE_PROCESSOR_OF = {"dit": "vit"}  # architecture without an image processor -> whose it uses: pixels from -1 to 1
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
PREPROCESSOR_FOLDER = "preprocessor"  # in an unfinished folder


def has_preprocessor(folder: Path) -> bool:
    """Return whether a folder holds an image processor or a feature extractor."""
    return any((folder / name).is_file() for name in PREPROCESSOR_FILES)


def load_processor(folder: Path) -> Any:
    """Load a folder's tokenizer, preprocessor, or the processor that holds both. Raises UserError where there is none."""
    if not has_preprocessor(folder):
        return load_tokenizer(folder)
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{folder} has no processor that transformers can load: {str(error).splitlines()[0]}"
        ) from error


def load_prepared_processor(folder: Path) -> Any:
    """Load the processor of a prepared folder."""
    return load_processor(
        folder / PROCESSOR_FOLDER if (folder / PROCESSOR_FOLDER).is_dir() else folder / TOKENIZER_FOLDER
    )


def load_image_processor(folder: str) -> Any:
    """Load the image processor of a folder. Raises UserError where there is none."""
    return _load("AutoImageProcessor", folder, "data.image_processor")


def load_feature_extractor(folder: str) -> Any:
    """Load the feature extractor of a folder. Raises UserError where there is none."""
    return _load("AutoFeatureExtractor", folder, "data.feature_extractor")


@functools.lru_cache(maxsize=4)
def _load(kind: str, folder: str, option: str) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{option}={folder} holds none that transformers can load: {str(error).splitlines()[0]}"
        ) from error


def new_feature_extractor(model_type: str, seconds: int) -> Any:
    """Make an architecture's feature extractor for windows of `seconds`. Raises UserError where it has none."""
    from transformers.models.auto.feature_extraction_auto import (
        FEATURE_EXTRACTOR_MAPPING_NAMES,
        feature_extractor_class_from_name,
    )

    name = FEATURE_EXTRACTOR_MAPPING_NAMES.get(model_type)
    extractor = feature_extractor_class_from_name(name)(chunk_length=seconds) if name else None
    if not has_fixed_window(extractor):
        raise UserError(
            f"model.type={model_type} has no feature extractor for windows of a fixed length: use model=whisper_1m, or no data.audio_column"
        )
    return extractor


def has_fixed_window(extractor: Any) -> bool:
    """Return whether a feature extractor makes equally many frames of each sound, as Whisper's does."""
    return all(isinstance(getattr(extractor, name, None), int) for name in ("sampling_rate", "chunk_length", "n_samples", "nb_max_frames"))  # fmt: skip


def new_image_processor(model_type: str, size: int) -> Any:
    """Make an architecture's image processor for images of size x size pixels. Raises UserError where it has none."""
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,
        get_image_processor_class_from_name,
    )

    name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(IMAGE_PROCESSOR_OF.get(model_type, model_type)) or {}).get("pil")
    if name is None:
        raise UserError(
            f"model.type={model_type} reads no images: use model=vit_5m, clip_5m or dit_5m, or no data.image_column"
        )
    kind = get_image_processor_class_from_name(name)
    side = {"height": size, "width": size}
    shape = side if "height" in (kind.size or {}) else {"shortest_edge": size}
    processor = kind(size=shape, crop_size=side) if getattr(kind, "do_center_crop", False) else kind(size=shape)
    if image_side(processor) != size:
        raise UserError(
            f"the image processor of model.type={model_type} makes no images of {size} x {size} pixels: "
            "give the folder of one with data.image_processor=..."
        )
    return processor


def image_side(image_processor: Any) -> int | None:
    """Return the side in pixels of an image processor's square images; None where their size varies or isn't square."""
    from PIL import Image

    shapes = {
        image_processor(Image.new("RGB", size), do_rescale=False, do_normalize=False)["pixel_values"][0].shape
        for size in ((48, 64), (80, 40))
    }
    channels, height, width = shapes.pop()
    return int(height) if not shapes and height == width and channels == 3 else None


def combine(model_type: str, preprocessor: Any, tokenizer: Any) -> Any:
    """Return the architecture's processor of both. Raises UserError where it has none."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UserError(
            f"model.type={model_type} has no processor of texts with images or sounds: use model=clip_5m for images with captions, "
            "model=whisper_1m for speech"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return getattr(transformers, name)(preprocessor, tokenizer)


def choose_feature_extractor(config: Config, start: Path | None) -> Any:
    """Return data.feature_extractor, else that of the bundle to start from, else the architecture's own."""
    folder = config.data.feature_extractor or (start if start and has_preprocessor(start) else None)
    if folder is None:
        return new_feature_extractor(_architecture(config, start), config.data.audio_seconds)
    extractor = load_feature_extractor(str(folder))
    if not has_fixed_window(extractor):
        raise UserError(f"the feature extractor in {folder} has no window of a fixed length: give another one")
    return extractor


def choose_image_processor(config: Config, start: Path | None) -> Any:
    """Return data.image_processor, else that of the bundle to start from, else the architecture's own."""
    folder = config.data.image_processor or (start if start and has_preprocessor(start) else None)
    if folder is None:
        return new_image_processor(_architecture(config, start), config.data.image_size)
    processor = load_image_processor(str(folder))
    if image_side(processor) is None:
        raise UserError(f"the image processor in {folder} does not make square images of one size: give another one")
    return processor


def write_processor(config: Config, start: Path | None, folder: Path, load: Callable[[str], Any]) -> None:
    """Combine an unfinished folder's preprocessor, loaded by `load`, and its tokenizer, if any, in one folder."""
    shutil.rmtree(folder / PROCESSOR_FOLDER, ignore_errors=True)
    processor = load(str(folder / PREPROCESSOR_FOLDER))
    if (folder / TOKENIZER_FOLDER).is_dir():
        processor = combine(_architecture(config, start), processor, load_tokenizer(folder / TOKENIZER_FOLDER))
    processor.save_pretrained(folder / PROCESSOR_FOLDER)
    for name in (TOKENIZER_FOLDER, PREPROCESSOR_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _architecture(config: Config, start: Path | None) -> str:
    """Return the model type of the bundle to start from, else that of the config."""
    if start and (start / "config.json").is_file():
        return str(json.loads((start / "config.json").read_text()).get("model_type", config.model.type))
    return config.model.type

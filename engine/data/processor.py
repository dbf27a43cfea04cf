"""What turns raw examples into a model's inputs, in the Hugging Face layout: a tokenizer, a preprocessor, or both.

A preprocessor is what makes arrays of images or sounds: an image processor, or a feature extractor.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.data.manifest import PROCESSOR, TOKENIZER
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError

LIKE = {"dit": "vit"}  # architectures without an image processor of their own -> whose they use: pixels from -1 to 1
FILES = ("preprocessor_config.json", "processor_config.json")  # that tell of a preprocessor
PREPROCESSOR = "preprocessor"  # folder of an unfinished folder


def has_preprocessor(folder: Path) -> bool:
    """Say whether a folder holds an image processor or a feature extractor."""
    return any((folder / name).is_file() for name in FILES)


def load_processor(folder: Path) -> Any:
    """Return the tokenizer, the preprocessor, or the processor that holds both, of a folder. Raises UserError where there is none."""
    if not has_preprocessor(folder):
        return load_tokenizer(folder)
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{folder} has no processor that transformers can load: {str(error).splitlines()[0]}"
        ) from error


def prepared_processor(folder: Path) -> Any:
    """Return the processor of a prepared folder."""
    return load_processor(folder / PROCESSOR if (folder / PROCESSOR).is_dir() else folder / TOKENIZER)


def load_image_processor(folder: str) -> Any:
    """Return the image processor of a folder. Raises UserError where there is none."""
    return _load("AutoImageProcessor", folder, "data.image_processor")


def load_feature_extractor(folder: str) -> Any:
    """Return the feature extractor of a folder. Raises UserError where there is none."""
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
    """Make the feature extractor of an architecture that hears `seconds` at once. Raises UserError where it has none."""
    from transformers.models.auto.feature_extraction_auto import (
        FEATURE_EXTRACTOR_MAPPING_NAMES,
        feature_extractor_class_from_name,
    )

    name = FEATURE_EXTRACTOR_MAPPING_NAMES.get(model_type)
    made = feature_extractor_class_from_name(name)(chunk_length=seconds) if name else None
    if not hears_windows(made):
        raise UserError(
            f"model.type={model_type} hears no speech in windows of so many seconds: use model=whisper_1m, or no data.audio_column"
        )
    return made


def hears_windows(extractor: Any) -> bool:
    """Say whether a feature extractor makes as many frames of each sound, as Whisper's does."""
    return all(isinstance(getattr(extractor, name, None), int) for name in ("sampling_rate", "chunk_length", "n_samples", "nb_max_frames"))  # fmt: skip


def new_image_processor(model_type: str, size: int) -> Any:
    """Make the image processor of an architecture for images of size x size pixels. Raises UserError where it has none."""
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,
        get_image_processor_class_from_name,
    )

    name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(LIKE.get(model_type, model_type)) or {}).get("pil")
    if name is None:
        raise UserError(
            f"model.type={model_type} reads no images: use model=vit_5m, clip_5m or dit_5m, or no data.image_column"
        )
    kind = get_image_processor_class_from_name(name)
    side = {"height": size, "width": size}
    shape = side if "height" in (kind.size or {}) else {"shortest_edge": size}
    made = kind(size=shape, crop_size=side) if getattr(kind, "do_center_crop", False) else kind(size=shape)
    if side_of(made) != size:
        raise UserError(
            f"the image processor of model.type={model_type} makes no images of {size} x {size} pixels: "
            "give the folder of one with data.image_processor=..."
        )
    return made


def side_of(image_processor: Any) -> int | None:
    """Return the side in pixels of the square images that an image processor makes; None where they aren't of one size."""
    from PIL import Image

    shapes = {
        image_processor(Image.new("RGB", size), do_rescale=False, do_normalize=False)["pixel_values"][0].shape
        for size in ((48, 64), (80, 40))
    }
    channels, height, width = shapes.pop()
    return int(height) if not shapes and height == width and channels == 3 else None


def join(model_type: str, preprocessor: Any, tokenizer: Any) -> Any:
    """Return one processor of both, of the architecture's kind. Raises UserError where it has none."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UserError(
            f"model.type={model_type} doesn't read texts with images or sounds: use model=clip_5m for images with captions, "
            "model=whisper_1m for speech"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return getattr(transformers, name)(preprocessor, tokenizer)


def choose_preprocessor(config: Config, given: Path | None) -> Any:
    """Return what makes arrays of the data's images or sounds, if they are: the one that is named, else that of `given`, else the architecture's own."""
    named = config.data.image_processor if config.data.image_column else config.data.feature_extractor
    folder = named or (given if given and has_preprocessor(given) else None)
    if config.data.image_column:
        return _image_processor(config, given, folder)
    return _feature_extractor(config, given, folder) if config.data.audio_column else None


def _feature_extractor(config: Config, given: Path | None, folder: Path | str | None) -> Any:
    if folder is None:
        return new_feature_extractor(_architecture(config, given), config.data.audio_seconds)
    found = load_feature_extractor(str(folder))
    if not hears_windows(found):
        raise UserError(f"the feature extractor in {folder} does not hear windows of one length: give another one")
    return found


def _image_processor(config: Config, given: Path | None, folder: Path | str | None) -> Any:
    if folder is None:
        return new_image_processor(_architecture(config, given), config.data.image_size)
    found = load_image_processor(str(folder))
    if side_of(found) is None:
        raise UserError(f"the image processor in {folder} does not make square images of one size: give another one")
    return found


def write_processor(config: Config, given: Path | None, folder: Path) -> None:
    """Put what reads images or sounds, and texts where there are, into one folder, as a model's folder has it."""
    shutil.rmtree(folder / PROCESSOR, ignore_errors=True)
    load = load_feature_extractor if config.data.audio_column else load_image_processor
    found = load(str(folder / PREPROCESSOR))
    if (folder / TOKENIZER).is_dir():
        found = join(_architecture(config, given), found, load_tokenizer(folder / TOKENIZER))
    found.save_pretrained(folder / PROCESSOR)
    for name in (TOKENIZER, PREPROCESSOR):
        shutil.rmtree(folder / name, ignore_errors=True)


def _architecture(config: Config, given: Path | None) -> str:
    """Return the model type of a start bundle, else that of the config."""
    if given and (given / "config.json").is_file():
        return str(json.loads((given / "config.json").read_text()).get("model_type", config.model.type))
    return config.model.type

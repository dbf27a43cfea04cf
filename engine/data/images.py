"""Images and captions: decode an image file, crop and resize it, normalize pixels, and fill a caption's template."""

from __future__ import annotations

import base64
import binascii
import io
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.data.document import is_missing
from engine.errors import UserError


def caption_fields(template: str | None) -> list[str]:
    """Return the names in braces of a caption's template."""
    return sorted({name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None})


def fill_caption(row: Mapping[str, Any], template: str | None, label: str | None) -> str | None:
    """Return the caption of a row: empty where there is no template, None where a part of it is missing."""
    values = {name: label if name == "label" else row.get(name) for name in caption_fields(template)}
    if any(is_missing(value) for value in values.values()):
        return None
    caption = (template or "").format(**values)
    return None if template and not caption.strip() else caption


def decode_image(content: bytes) -> Any:
    """Decode an image file: Pillow, RGB, rotated as its EXIF says. Raises ValueError for anything else."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise ValueError(str(error)) from error


def to_pixels(image: Any, processor: Any) -> np.ndarray:
    """Crop and resize an image (Pillow) as an image processor does: uint8 [S, S, 3]."""
    pixels_CSS = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    return np.ascontiguousarray(np.asarray(pixels_CSS).astype(np.uint8).transpose(1, 2, 0))


def normalize(pixels_BSSC: np.ndarray, processor: Any) -> np.ndarray:
    """Rescale and normalize pixels as an image processor does, to what the model reads: float32 [B, 3, S, S]."""
    values_BCSS = pixels_BSSC.transpose(0, 3, 1, 2).astype(np.float32)
    if processor.do_rescale:
        values_BCSS *= np.float32(processor.rescale_factor)
    if processor.do_normalize:
        values_BCSS -= np.array(processor.image_mean, np.float32)[:, None, None]
        values_BCSS /= np.array(processor.image_std, np.float32)[:, None, None]
    return np.ascontiguousarray(values_BCSS)


def encode_png(pixels_SSC: np.ndarray) -> str:
    """Return pixels as a PNG file in base64, as requests carry images."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels_SSC).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def from_base64(text: str) -> Any:
    """Decode the image of a request: a file in base64, or a data URL of one. Raises UserError for anything else."""
    try:
        return decode_image(base64.b64decode(text.partition("base64,")[2] or text, validate=True))
    except (ValueError, binascii.Error) as error:
        raise UserError("the image cannot be read: send a PNG or JPEG file in base64") from error

"""Images with labels and captions: rows of a table to pixels of one size, decoded once; and pixels as samples."""

from __future__ import annotations

import base64
import binascii
import io
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import DataConfig
from engine.data.corpus import label_name, no_label
from engine.data.media import Decoded, content_of, decoded
from engine.data.processor import load_image_processor
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.inputs import File
    from engine.data.shards import Split


def pictures(rows: Iterable[dict[str, Any]], config: DataConfig, file: File, counts: Counter[str]) -> Iterator[Decoded]:
    """Return (caption, label, pixels) of each row that has an image, and a label and a caption where these are asked for.

    Pixels are uint8 [S, S, 3], as data.image_processor cuts and scales them. Count the rows left out, by reason.
    """
    assert config.image_processor
    processor = load_image_processor(config.image_processor)

    def read(row: dict[str, Any]) -> Decoded | str:
        label = row.get(config.label_column) if config.label_column else None
        if config.label_column and no_label(label):
            return "without a label"
        caption = caption_of(row, config, label_name(label))
        if caption is None:
            return "without a caption"
        content = content_of(row[config.image_column or ""], file)
        if not content:
            return "without an image"
        try:
            return caption, label_name(label), pixels(decode(content), processor)
        except ValueError:
            return "not an image"

    return decoded(rows, read, counts)


def caption_fields(template: str | None) -> list[str]:
    """Return the names in braces of a caption."""
    return sorted({name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None})


def caption_of(row: dict[str, Any], config: DataConfig, label: str | None) -> str | None:
    """Return the caption of a row: empty where none is asked for, None where a part of it is missing."""
    values = {name: label if name == "label" else row.get(name) for name in caption_fields(config.caption)}
    if any(no_label(value) for value in values.values()):
        return None
    caption = (config.caption or "").format(**values)
    return None if config.caption and not caption.strip() else caption


def decode(content: bytes) -> Any:
    """Return the image (Pillow, RGB) in the bytes of its file, turned as its camera says. Raises ValueError for anything else."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise ValueError(str(error)) from error


def pixels(image: Any, processor: Any) -> np.ndarray:
    """Cut and scale an image (Pillow) as an image processor does: uint8 [S, S, 3]."""
    found_CSS = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    return np.ascontiguousarray(np.asarray(found_CSS).astype(np.uint8).transpose(1, 2, 0))


def normalized(pixels_BSSC: np.ndarray, processor: Any) -> np.ndarray:
    """Return pixels as the model takes them, as an image processor scales and normalizes: float32 [B, 3, S, S]."""
    found = pixels_BSSC.transpose(0, 3, 1, 2).astype(np.float32)
    if processor.do_rescale:
        found *= np.float32(processor.rescale_factor)
    if processor.do_normalize:
        found -= np.array(processor.image_mean, np.float32)[:, None, None]
        found /= np.array(processor.image_std, np.float32)[:, None, None]
    return np.ascontiguousarray(found)


def png(pixels_SSC: np.ndarray) -> str:
    """Return pixels as a PNG file in base64: an image as a request carries it."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels_SSC).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def from_base64(text: str) -> Any:
    """Return the image (Pillow, RGB) of a request: an image file in base64, or a data URL of one. Raises UserError for anything else."""
    try:
        return decode(base64.b64decode(text.partition("base64,")[2] or text, validate=True))
    except (ValueError, binascii.Error) as error:
        raise UserError("the image cannot be read: send a PNG or JPEG file in base64") from error


class Pictures:
    """The split's images.

    Sample i is {"pixels": uint8 [S, S, 3], "label": int} and, where the data have captions, "tokens": int64 [at most
    max_length], with its closing special tokens.
    """

    def __init__(self, split: Split, max_length: int) -> None:
        """Raise UserError where the split has no images."""
        if not split.manifest.image_size:
            raise UserError(f"{split.folder} has no images: prepare it with data.image_column=...")
        self.split, self.max_length, self.closing = split, max_length, split.manifest.closing_tokens
        self.labelled, self.captioned = bool(split.manifest.labels), split.manifest.kind == "captioned"

    def __len__(self) -> int:
        return self.split.rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample: dict[str, Any] = {
            "pixels": self.split.image(i),
            "label": self.split.label(i) if self.labelled else 0,
        }
        if self.captioned:
            tokens = self.split.document(i)
            if len(tokens) > self.max_length:
                end = len(tokens) - self.closing
                tokens = np.concatenate([tokens[: self.max_length - self.closing], tokens[end:]])
            sample["tokens"] = tokens.astype(np.int64)
        return sample

"""Images, with a label each where one is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import Config, DataConfig
from engine.data.columns import Column
from engine.data.document import Document, is_missing, label_name
from engine.data.images import caption_fields, decode_image, fill_caption, to_pixels
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, Row
from engine.data.kinds.labeled_text import truncate
from engine.data.media_columns import BYTES_PER_TOKEN, decode_rows, read_bytes
from engine.data.processor import choose_image_processor, image_side, load_image_processor
from engine.data.tokenizer import append_eos
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.shards import Split


@dataclass(frozen=True)
class Images(DataKind):
    """Pixels of one size, decoded once, and the label where data.label_column is set. Samples: `ImageSamples`."""

    name = "images"
    description = "images with labels"
    hint = "say which columns hold them with data.image_column=... and data.label_column=..."
    has_text = False
    has_preprocessor = True

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Match where an image is named, and no caption."""
        return bool(config.image_column) and not config.audio_column and not config.caption

    @property
    def has_labels(self) -> bool:
        """Only where data.label_column is set."""
        return self.config.label_column is not None

    @property
    def columns(self) -> dict[str, str]:
        """The image, the columns that the caption names, and the label."""
        labels = {self.config.label_column: "data.label_column"} if self.config.label_column else {}
        captions = {name: "data.caption" for name in caption_fields(self.config.caption) if name != "label"}
        return {self.config.image_column or "": "data.image_column"} | captions | labels

    @property
    def stored_columns(self) -> tuple[Column, ...]:
        """The label where there are labels, and the pixels."""
        labels = (Column("label", "int32", "scalar"),) if self.has_labels else ()
        return (*labels, Column("image", "uint8", "fixed", BYTES_PER_TOKEN))

    def read(self, rows: Iterable[dict[str, Any]], file: InputFile, counts: Counter[str]) -> Iterator[Row]:
        """Yield caption, label and pixels of each row that has an image, and a label and caption where these are asked for.

        Pixels are uint8 [S, S, 3], as data.image_processor crops and resizes them.
        """
        config = self.config
        assert config.image_processor
        processor = load_image_processor(config.image_processor)

        def decode(row: dict[str, Any]) -> Row | str:
            label = row.get(config.label_column) if config.label_column else None
            if config.label_column and is_missing(label):
                return "without a label"
            caption = fill_caption(row, config.caption, label_name(label))
            if caption is None:
                return "without a caption"
            content = read_bytes(row[config.image_column or ""], file)
            if not content:
                return "without an image"
            try:
                return Row(caption, label_name(label), to_pixels(decode_image(content), processor))
            except ValueError:
                return "not an image"

        return decode_rows(rows, decode, counts)

    def make_preprocessor(self, config: Config, start: Path | None) -> Any:
        """Return the image processor."""
        return choose_image_processor(config, start)

    def load_preprocessor(self, folder: str) -> Any:
        """Load the image processor."""
        return load_image_processor(folder)

    def manifest_fields(self, processor: Path) -> dict[str, Any]:
        """Return the side of an image in pixels."""
        return {"image_size": image_side(load_image_processor(str(processor))) or 0}

    def values(self, documents: Sequence[Document], label_ids: Mapping[str, int]) -> dict[str, Sequence[Any]]:
        """Return the pixels, and the labels where there are."""
        labels = {"label": [label_ids[document.label or ""] for document in documents]} if self.has_labels else {}
        return {**labels, "image": [document.signal for document in documents]}


@dataclass(frozen=True)
class CaptionedImages(Images):
    """Images with a text each, whose template is data.caption. Samples: `ImageSamples`."""

    name = "captioned"
    description = "images with captions"
    hint = (
        "say which column holds the images with data.image_column=..., and what their captions are with "
        "data.caption='a photo of a {label}' or '{COLUMN}'"
    )
    has_text = True

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Match where an image and a caption are given."""
        return bool(config.image_column) and not config.audio_column and bool(config.caption)

    def finish_tokenizer(self, folder: Path, trained: bool) -> None:
        """End each caption with the end token."""
        append_eos(folder)


class ImageSamples:
    """The images of a split.

    Sample i is {"pixels": uint8 [S, S, 3], "label": int} and, where the data have captions, "tokens": int64 [at most
    max_length], with its closing special tokens.
    """

    def __init__(self, split: Split, max_length: int) -> None:
        """Raise UserError where the split has no images."""
        if not split.manifest.image_size:
            raise UserError(f"{split.folder} has no images: prepare it with data.image_column=...")
        self.split, self.max_length, self.closing = split, max_length, split.manifest.closing_tokens
        self.has_labels, self.has_captions = bool(split.manifest.labels), split.manifest.kind == CaptionedImages.name

    def __len__(self) -> int:
        return self.split.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample: dict[str, Any] = {
            "pixels": self.split.image(i),
            "label": self.split.label(i) if self.has_labels else 0,
        }
        if self.has_captions:
            sample["tokens"] = truncate(self.split.document(i), self.max_length, self.closing).astype(np.int64)
        return sample

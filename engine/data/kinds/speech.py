"""Sounds with their transcripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import Config, DataConfig
from engine.data.audio import decode_audio
from engine.data.columns import Column
from engine.data.document import Document, is_missing, label_name
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, Row
from engine.data.media_columns import BYTES_PER_TOKEN, decode_rows, read_bytes
from engine.data.processor import choose_feature_extractor, load_feature_extractor
from engine.data.tokenizer import append_eos, use_transcript_template
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.shards import Split


@dataclass(frozen=True)
class Speech(DataKind):
    """Sounds of one sampling rate, decoded once, and the words spoken. Samples: `SpeechSamples`."""

    name = "speech"
    description = "speech with transcripts"
    hint = (
        "say which column holds the sounds with data.audio_column=..., and which their words with data.text_column=..."
    )
    has_preprocessor = True
    uses_tokenizer_template = False

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Match where a sound is named."""
        return bool(config.audio_column)

    @property
    def columns(self) -> dict[str, str]:
        """The transcript and the sound."""
        return {self.config.text_column: "data.text_column", self.config.audio_column or "": "data.audio_column"}

    @property
    def stored_columns(self) -> tuple[Column, ...]:
        """The samples of each sound."""
        return (Column("sound", "int16", "list", BYTES_PER_TOKEN),)

    def read(self, rows: Iterable[dict[str, Any]], file: InputFile, counts: Counter[str]) -> Iterator[Row]:
        """Yield transcript and samples of each row that has both.

        Samples are int16 [N], of one channel, at the feature extractor's rate, and no longer than its window.
        """
        config = self.config
        assert config.feature_extractor
        extractor = load_feature_extractor(config.feature_extractor)

        def decode(row: dict[str, Any]) -> Row | str:
            words = row.get(config.text_column)
            text = "" if is_missing(words) else label_name(words) or ""  # spoken digits may be a column of numbers
            if not text.strip():
                return "without text"
            content = read_bytes(row[config.audio_column or ""], file)
            if not content:
                return "without audio"
            try:
                sound = decode_audio(content, extractor.sampling_rate, extractor.chunk_length)
            except ValueError:
                return "not audio"
            if len(sound) > extractor.n_samples:
                return f"longer than {extractor.chunk_length} s"
            return Row(text, signal=sound) if len(sound) else "without audio"

        return decode_rows(rows, decode, counts)

    def make_preprocessor(self, config: Config, start: Path | None) -> Any:
        """Return the feature extractor."""
        return choose_feature_extractor(config, start)

    def load_preprocessor(self, folder: str) -> Any:
        """Load the feature extractor."""
        return load_feature_extractor(folder)

    def manifest_fields(self, processor: Path) -> dict[str, Any]:
        """Return the sampling rate in Hz."""
        return {"sampling_rate": load_feature_extractor(str(processor)).sampling_rate}

    def finish_tokenizer(self, folder: Path, trained: bool) -> None:
        """Frame each text as a transcript with a new tokenizer; let a given one end it with the end token."""
        if trained:
            use_transcript_template(folder)
        append_eos(folder)

    def values(self, documents: Sequence[Document], label_ids: Mapping[str, int]) -> dict[str, Sequence[Any]]:
        """Return the samples."""
        return {"sound": [document.signal for document in documents]}


class SpeechSamples:
    """The sounds of a split. Sample i is {"sound": int16 [N], "tokens": int64 [at most max_length], with the end token}."""

    def __init__(self, split: Split, max_length: int) -> None:
        """Raise UserError where the split has no sounds."""
        if not split.manifest.sampling_rate:
            raise UserError(f"{split.folder} has no sounds: prepare it with data.audio_column=...")
        self.split, self.max_length = split, max_length

    def __len__(self) -> int:
        return self.split.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = self.split.document(i)[: self.max_length].astype(np.int64)
        return {"sound": self.split.sound(i), "tokens": tokens}

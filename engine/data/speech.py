"""Speech with its words: rows of a table to sounds of one sampling rate, decoded once; and sounds as samples."""

from __future__ import annotations

import base64
import binascii
import io
import wave
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import DataConfig
from engine.data.corpus import label_name, no_label
from engine.data.media import Decoded, content_of, decoded
from engine.data.processor import load_feature_extractor
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.inputs import File
    from engine.data.shards import Split

FULL_SCALE = 2**15  # of 16-bit samples
RATES = range(1_000, 400_000)  # of files that are read, in Hz
MOST_CHANNELS = 64


def utterances(
    rows: Iterable[dict[str, Any]], config: DataConfig, file: File, counts: Counter[str]
) -> Iterator[Decoded]:
    """Return (words, None, samples) of each row that has both; count the rows left out, by reason.

    Samples are int16 [N], of one channel, at the feature extractor's rate, and no more than it hears at once.
    """
    assert config.feature_extractor
    extractor = load_feature_extractor(config.feature_extractor)

    def read(row: dict[str, Any]) -> Decoded | str:
        words = row.get(config.text_column)
        text = "" if no_label(words) else label_name(words) or ""  # digits may be a column of numbers
        if not text.strip():
            return "without text"
        content = content_of(row[config.audio_column or ""], file)
        if not content:
            return "without audio"
        try:
            sound = decode(content, extractor.sampling_rate, extractor.chunk_length)
        except ValueError:
            return "not audio"
        if len(sound) > extractor.n_samples:
            return f"longer than {extractor.chunk_length} s"
        return (text, None, sound) if len(sound) else "without audio"

    return decoded(rows, read, counts)


def decode(content: bytes, rate: int, most_s: int) -> np.ndarray:
    """Return the sound in the bytes of a file as int16 [N], its channels averaged, resampled to `rate` Hz.

    Of one that is longer than `most_s` seconds a second more than that is returned, not all. Raises ValueError for anything
    else than a sound, and UserError where the libraries that read sounds are not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise UserError("sounds need the packages soundfile and soxr: pip install 'manta-train[audio]'") from error
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as opened:
            own_rate = opened.samplerate
            if own_rate not in RATES or opened.channels > MOST_CHANNELS:
                raise ValueError(f"{opened.channels} channels of {own_rate} Hz")
            parts = [np.empty(0, np.float32)]
            # A second at a time, and no more than needed: what a small file unpacks to has no bound.
            for block_NC in opened.blocks(own_rate, dtype="float32", always_2d=True):
                parts.append(block_NC.mean(1))
                if len(parts) > most_s + 1:
                    break
    except (
        soundfile.SoundFileError,
        RuntimeError,
        TypeError,
    ) as error:  # a raw file's ending makes it ask for a format
        raise ValueError(str(error)) from error
    sound_N = np.concatenate(parts)
    if not np.isfinite(sound_N).all():
        raise ValueError("its samples are no numbers")
    if own_rate != rate:
        sound_N = soxr.resample(sound_N, own_rate, rate)
    return np.rint(sound_N * FULL_SCALE).clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def from_base64(text: str, rate: int, most_s: int) -> np.ndarray:
    """Return the sound of a request: an audio file in base64, decoded. Raises UserError for anything else."""
    try:
        return decode(base64.b64decode(text, validate=True), rate, most_s)
    except (ValueError, binascii.Error) as error:
        raise UserError("the sound cannot be read: send a WAV, FLAC, OGG or MP3 file") from error


def wav(sound_N: np.ndarray, rate: int) -> bytes:
    """Return a sound, int16 [N], as a WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(sound_N.astype("<i2").tobytes())
    return out.getvalue()


class Utterances:
    """The split's sounds. Sample i is {"sound": int16 [N], "tokens": int64 [at most max_length]}, the end token among them."""

    def __init__(self, split: Split, max_length: int) -> None:
        """Raise UserError where the split has no sounds."""
        if not split.manifest.sampling_rate:
            raise UserError(f"{split.folder} has no sounds: prepare it with data.audio_column=...")
        self.split, self.max_length = split, max_length

    def __len__(self) -> int:
        return self.split.rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = self.split.document(i)[: self.max_length].astype(np.int64)
        return {"sound": self.split.sound(i), "tokens": tokens}

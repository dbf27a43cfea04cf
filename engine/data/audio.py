"""Sounds: decode an audio file to one sampling rate, and encode one."""

from __future__ import annotations

import base64
import binascii
import io
import wave

import numpy as np

from engine.errors import UserError

FULL_SCALE = 2**15  # of 16-bit samples
SAMPLING_RATES = range(1_000, 400_000)  # of files that are read, in Hz
MAX_CHANNELS = 64


def decode_audio(content: bytes, rate: int, max_s: int) -> np.ndarray:
    """Decode an audio file to int16 [N], its channels averaged, resampled to `rate` Hz.

    Of a sound longer than `max_s` seconds, only one second more than that is returned. Raises ValueError for anything but
    a sound, and UserError where the libraries that read sounds are not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise UserError("sounds need the packages soundfile and soxr: pip install 'manta-train[audio]'") from error
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as opened:
            file_rate = opened.samplerate
            if file_rate not in SAMPLING_RATES or opened.channels > MAX_CHANNELS:
                raise ValueError(f"{opened.channels} channels of {file_rate} Hz")
            parts = [np.empty(0, np.float32)]
            # A second at a time, and no more than needed: a small file may decode to any length.
            for block_NC in opened.blocks(file_rate, dtype="float32", always_2d=True):
                parts.append(block_NC.mean(1))
                if len(parts) > max_s + 1:
                    break
    except (
        soundfile.SoundFileError,
        RuntimeError,
        TypeError,
    ) as error:  # soundfile raises TypeError for the suffix of a raw file
        raise ValueError(str(error)) from error
    sound_N = np.concatenate(parts)
    if not np.isfinite(sound_N).all():
        raise ValueError("its samples are not finite")
    if file_rate != rate:
        sound_N = soxr.resample(sound_N, file_rate, rate)
    return np.rint(sound_N * FULL_SCALE).clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def from_base64(text: str, rate: int, max_s: int) -> np.ndarray:
    """Decode the sound of a request, an audio file in base64. Raises UserError for anything else."""
    try:
        return decode_audio(base64.b64decode(text, validate=True), rate, max_s)
    except (ValueError, binascii.Error) as error:
        raise UserError("the sound cannot be read: send a WAV, FLAC, OGG or MP3 file") from error


def encode_wav(sound_N: np.ndarray, rate: int) -> bytes:
    """Return a sound, int16 [N], as a WAV file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(sound_N.astype("<i2").tobytes())
    return out.getvalue()

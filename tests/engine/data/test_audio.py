"""Decoding audio files of all formats to one channel at one sampling rate, with bounded memory."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine.config import Config, with_values
from engine.data.audio import FULL_SCALE, decode_audio, encode_wav, from_base64
from engine.data.prepare import prepare
from engine.data.remote_store import verify
from engine.errors import UserError
from tests.engine.data.audio_samples import file_of, hum, hummed_table


def test_samples_of_16_bits_are_kept_bit_for_bit() -> None:
    sound = np.random.default_rng(0).integers(-FULL_SCALE, FULL_SCALE, 5000).astype(np.int16)
    assert np.array_equal(decode_audio(encode_wav(sound, 16000), 16000, 30), sound)
    assert np.array_equal(decode_audio(file_of(sound, 16000, "FLAC"), 16000, 30), sound)
    stereo = np.stack([sound, sound], axis=1)
    assert np.array_equal(decode_audio(file_of(stereo, 16000), 16000, 30), sound)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_resampling_keeps_the_frequency(kind: str) -> None:
    for rate in (8000, 16000, 44100):
        sound = decode_audio(file_of(hum("two", rate), rate, kind), 16000, 30).astype(float)
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
        assert spectrum.argmax() * 16000 / len(sound) == pytest.approx(900, abs=8)
        assert np.abs(sound).max() == pytest.approx(0.5 * FULL_SCALE, rel=0.1)


def test_only_the_beginning_of_a_long_sound_is_decoded() -> None:
    day = file_of(np.zeros(8000 * 600, np.int16), 8000, "FLAC")
    assert len(day) < 2**17
    assert 2 * 16000 < len(decode_audio(day, 16000, 2)) <= 4 * 16000


@pytest.mark.parametrize(
    "content",
    [b"", b"no sound", b"RIFF", encode_wav(np.zeros(100, np.int16), 16000)[:30], b"fLaC" + bytes(60)],
)
def test_content_that_is_no_sound_raises_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        decode_audio(content, 16000, 30)


def test_invalid_headers_are_refused() -> None:
    good = encode_wav(np.zeros(100, np.int16), 16000)
    channels, rate = good[:22] + struct.pack("<H", 1000) + good[24:], good[:24] + struct.pack("<I", 2**31) + good[28:]
    for content in (channels, rate):
        with pytest.raises(ValueError):
            decode_audio(content, 16000, 30)
    out = io.BytesIO()
    soundfile.write(out, np.array([0.0, np.nan]), 16000, format="WAV", subtype="FLOAT")
    with pytest.raises(ValueError, match="not finite"):
        decode_audio(out.getvalue(), 16000, 30)


def test_base64_round_trip() -> None:
    with pytest.raises(UserError, match="send a WAV, FLAC, OGG or MP3 file"):
        from_base64("%%%", 16000, 30)


def test_an_interrupted_preparation_continues_with_the_same_bytes(tiny: Config, tmp_path: Path) -> None:
    table = hummed_table(tmp_path / "train.parquet", 96)
    config = with_values(
        tiny,
        {"data.source": "files", "data.path": str(table), "data.audio_column": "audio", "data.text_column": "words",
         "data.audio_seconds": 1, "data.shard_tokens": 1024, "data.max_documents": None, "model.type": "whisper",
         "runs_dir": str(tmp_path / "whole")},
    )  # fmt: skip
    whole = prepare(config)
    assert sum(len(split["shards"]) for split in verify(whole).splits.values()) > 6
    runs, breaks = tmp_path / "runs", 0

    def broken_after(calls: int) -> Path | None:
        left = [calls]

        def heard(stage: str, done: int, total: int) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        try:
            return prepare(with_values(config, {"runs_dir": str(runs)}), progress=heard)
        except KeyboardInterrupt:
            return None

    while (found := broken_after(10)) is None:
        breaks += 1
        assert breaks < 20
    assert breaks > 1
    assert verify(found).hash == verify(whole).hash
    assert all((whole / p.name).read_bytes() == p.read_bytes() for p in found.glob("*.arrow"))

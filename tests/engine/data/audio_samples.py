"""Synthetic speech: each word is a tone of its own, so that a small model can learn to distinguish them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

TONES = {"one": 300.0, "two": 900.0, "three": 2000.0}  # Hz
WORD_S = 0.25


def hum(words: str, rate: int, seed: int = 0) -> np.ndarray:
    """Return an utterance as float32 [samples]: a tone a word, with some noise."""
    numbers = np.random.default_rng(seed)
    time_s = np.arange(int(WORD_S * rate)) / rate
    tones = [np.sin(2 * np.pi * TONES[word] * time_s) * np.hanning(len(time_s)) for word in words.split()]
    whole = 0.5 * np.concatenate(tones) + 0.01 * numbers.standard_normal(len(tones) * len(time_s))
    return np.asarray(whole, dtype=np.float32)


def file_of(sound: np.ndarray, rate: int, kind: str = "WAV") -> bytes:
    """Return a sound as an audio file."""
    out = io.BytesIO()
    soundfile.write(out, sound, rate, format=kind)
    return out.getvalue()


def hummed_table(path: Path, rows: int) -> Path:
    """Write utterances of one to three words, as WAV of 8 kHz and FLAC of 16 kHz in stereo; rows 3 to 7 are faulty."""
    numbers = np.random.default_rng(0)
    table: list[dict[str, Any]] = []
    for i in range(rows):
        words = " ".join(numbers.choice(list(TONES), numbers.integers(1, 4)))
        mono = hum(words, 8000, i) if i % 2 else hum(words, 16000, i)
        content = file_of(mono, 8000) if i % 2 else file_of(np.stack([mono, mono], axis=1), 16000, "FLAC")
        table.append({"audio": {"bytes": content, "path": None}, "words": words})
    table[3]["audio"] = {"bytes": b"RIFF and no more", "path": None}
    table[4]["audio"] = {"bytes": None, "path": "gone.wav"}
    table[5]["words"] = " "
    table[6]["audio"] = {"bytes": file_of(hum("one two three one two", 8000), 8000), "path": None}
    table[7]["audio"] = {"bytes": file_of(np.zeros(0, np.float32), 8000), "path": None}
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=16)
    return path

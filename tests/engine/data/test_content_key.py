from pathlib import Path
from typing import Any

import pytest

from engine.config import DataConfig
from engine.data.content_key import content_key
from engine.data.input_files import InputFile
from engine.errors import UserError

FILES = [
    ("files", "in/a.txt", InputFile("in/a.txt", "a.txt", None, 12, "1700000000.0", None)),
    ("files", "in/b.txt", InputFile("in/b.txt", "b.txt", "test", 7, "etag", None)),
]


@pytest.mark.parametrize(
    ("options", "seed", "key"),
    [
        ({"path": "in", "vocab_size": 300}, 3, "608571bb9fac6e79c115d51afb7897f0d854dcf908dcc68b671318b212dc1c7c"),
        (
            {"path": "in", "label_column": "label", "max_documents": 5}, 0,
            "10475337907f8ace9bdb1fc7d9259ec5b0850773464ff9f976ad874c8b51a191",
        ),
        (
            {"sources": {"a": {"path": "in", "weight": 2.0, "license": "MIT"}, "b": {"path": "out", "stream": True}}}, 0,
            "54cdd88f9289895cd7170fdf9ea5f813a307bc72df9fe3243219baa0d8abf683",
        ),
    ],
)  # fmt: skip
def test_keys_are_those_of_earlier_versions(options: dict[str, Any], seed: int, key: str) -> None:
    assert content_key(DataConfig(**options), seed, None, FILES, None) == key


def test_keys_depend_on_what_decides_the_shards() -> None:
    base = content_key(DataConfig(path="in"), 0, None, FILES, None)
    packed = DataConfig(path="in", sequence_length=77, packing="best_fit", within_documents=True, name="other")
    assert content_key(packed, 0, None, FILES, None) == base
    others = [
        content_key(DataConfig(path="in", max_documents=5), 0, None, FILES, None),
        content_key(DataConfig(path="in"), 1, None, FILES, None),
        content_key(DataConfig(path="in"), 0, None, FILES[:1], None),
    ]
    assert len({base, *others}) == 4


def test_a_missing_tokenizer_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        content_key(DataConfig(path="in"), 0, tmp_path / "none", FILES, None)

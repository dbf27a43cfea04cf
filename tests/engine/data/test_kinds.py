from collections import Counter
from typing import Any

import pytest

from engine.config import DataConfig
from engine.data.document import Document
from engine.data.input_files import InputFile
from engine.data.kinds import DataKind, kind_class, kind_classes, kind_of, matching_kinds
from engine.errors import UserError

FILE = InputFile("rows.jsonl", "rows.jsonl", None, 0, "", None)
LABELED = {"path": "x", "label_column": "label"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["text"]),
        ({"source": "python_stdlib"}, ["text"]),
        ({"source": "python_functions"}, ["labelled"]),
        (LABELED, ["labelled", "token_labels"]),
        ({"image_column": "image"}, ["images"]),
        ({"image_column": "image", "label_column": "label"}, ["images"]),
        ({"image_column": "image", "label_column": "label", "caption": "a {label}"}, ["captioned"]),
        ({"audio_column": "audio"}, ["speech"]),
    ],
)
def test_options_tell_the_kind(options: dict[str, Any], names: list[str]) -> None:
    assert [kind.name for kind in matching_kinds(DataConfig(**options))] == names


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([{"text": "a", "label": "x"}], "labelled"),
        ([{"text": "a", "label": None}, {"text": "b", "label": 1}], "labelled"),
        ([{"text": ["a"], "label": None}, {"text": ["b"], "label": ["x"]}], "token_labels"),
        ([], "labelled"),
    ],
)
def test_rows_tell_the_kind_where_options_do_not(rows: list[dict[str, Any]], name: str) -> None:
    assert kind_of(DataConfig(**LABELED), lambda: rows).name == name


def test_rows_are_read_only_where_options_do_not_tell() -> None:
    assert kind_of(DataConfig(), lambda: pytest.fail("read")).name == "text"


def test_every_kind_describes_itself() -> None:
    for name, kind in kind_classes().items():
        assert kind.name == name
        assert issubclass(kind, DataKind)
        assert kind.description
        assert "data." in kind.hint
    with pytest.raises(UserError, match="did you mean 'speech'"):
        kind_class("speach")


def test_rows_that_cannot_be_used_are_counted() -> None:
    rows = [
        {"text": "a", "label": "x"}, {"text": 5, "label": "x"}, {"text": "\ud83d", "label": "x"}, {"text": "b", "label": None},
        {"text": "c", "label": float("nan")}, {"text": "d", "label": 2.0}, {"label": "x"},
    ]  # fmt: skip
    counts: Counter[str] = Counter()
    kept = list(kind_class("labelled")(DataConfig(**LABELED)).read(rows, FILE, counts))
    assert [(row.text, row.label) for row in kept] == [("a", "x"), ("d", "2")]
    assert counts == {"without text": 3, "without a label": 2}
    counts = Counter()
    kept = list(kind_class("text")(DataConfig()).read(rows, FILE, counts))
    assert [row.text for row in kept] == ["a", "b", "c", "d"]
    assert counts == {"without text": 3}


def test_labels_are_stored_as_indices() -> None:
    kind = kind_class("labelled")(DataConfig(**LABELED))
    documents = [Document("a", "train", "f", label) for label in ("no", "yes", "no")]
    assert [column.name for column in kind.stored_columns] == ["label"]
    assert kind.values(documents, {"no": 0, "yes": 1}) == {"label": [0, 1, 0]}

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import Config, replace
from engine.data.manifest import Manifest
from engine.data.prepare import prepare
from engine.data.remote_store import verify
from engine.data.shards import Split
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from tests.engine.data.conftest import documents


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as the Hub has them: two configurations, splits, several shards, a class label."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "reviews"
    (folder / "data").mkdir(parents=True)
    features = datasets.Features(
        {"body": datasets.Value("string"), "stars": datasets.ClassLabel(names=["bad", "good"])}
    )
    for split, first, last in (("train-0", 0, 60), ("train-1", 60, 100), ("test-0", 90, 120)):
        rows = {
            "body": [f"review number {i}" for i in range(first, last)],
            "stars": [i % 2 for i in range(first, last)],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / "data" / f"{split}.parquet"))
    pq.write_table(pa.table({"text": [f"other {i}" for i in range(50)]}), folder / "data" / "other.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n- config_name: other\n  data_files: data/other.parquet\n---\n"
    )
    return folder


def texts(folder: Path) -> list[str]:
    tokenizer, found = load_tokenizer(folder / "tokenizer"), []
    for name in Manifest.load(folder).splits:
        split = Split.open(folder, name)
        found += [tokenizer.decode(split.document(i)[:-1]) for i in range(split.num_rows)]
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_dataset_folder(configured: Callable[..., Config], dataset: Path, stream: bool) -> None:
    config = configured(
        source="huggingface", path=str(dataset), text_column="body", test_split="test", stream=stream, vocab_size=300
    )
    folder = prepare(config)
    manifest = verify(folder)
    assert sorted(texts(folder)) == sorted(f"review number {i}" for i in range(120))
    assert manifest.splits["test"]["documents"] == 30
    assert manifest.skipped == {"duplicate": 10}  # of the training split
    assert {source["path"] for source in manifest.read_sources(folder)} == {f"{dataset}:train", f"{dataset}:test"}
    assert prepare(config) == folder
    if stream:  # which is what comes of a dataset of unknown size
        assert prepare(replace(config, data__stream=None)) == folder


def test_class_labels_keep_their_names(configured: Callable[..., Config], dataset: Path) -> None:
    options = {"source": "huggingface", "path": str(dataset), "text_column": "body", "label_column": "stars"}
    found = documents(configured(**options, stream=False).data, 0, Counter())
    assert {d.text: d.label for d in found} == {f"review number {i}": ("bad", "good")[i % 2] for i in range(100)}
    assert found == documents(configured(**options, stream=False).data, 0, Counter())


def test_subset(configured: Callable[..., Config], dataset: Path) -> None:
    found = documents(configured(source="huggingface", path=str(dataset), subset="other").data, 0, Counter())
    assert {d.text for d in found} == {f"other {i}" for i in range(50)}
    assert {d.split for d in found} == {"train", "validation", "test"}


def test_a_stream_is_read_once(
    configured: Callable[..., Config], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.data import huggingface

    monkeypatch.setattr("engine.data.prepare.MAX_CACHED_BYTES", 0)
    read, calls = huggingface.read, []
    monkeypatch.setattr(huggingface, "read", lambda part, *rest: calls.append(part.number) or read(part, *rest))
    config = configured(
        source="huggingface", path=str(dataset), text_column="body", stream=True, vocab_size=300, shard_tokens=1024
    )
    folder = prepare(config)
    assert sorted(calls) == [0, 1]
    assert len(texts(folder)) == 100


def test_datasets_that_cannot_be_loaded(configured: Callable[..., Config], dataset: Path) -> None:
    from engine.data.corpus import check_input

    options = {"source": "huggingface", "path": str(dataset), "text_column": "body"}
    for given, message in (
        (
            options | {"path": "nobody/knows-it"},
            "can be neither found here nor fetched .*: check data.path, and HF_HUB_OFFLINE",
        ),
        (options | {"subset": "third"}, r"cannot be loaded so .*check data\.subset and data\.split"),
        (options | {"split": "dev"}, r"cannot be loaded so .*check data\.subset and data\.split"),
        (options | {"text_column": "text"}, r"has no column 'text' \(data\.text_column\), only body, stars"),
    ):
        with pytest.raises(UserError, match=message):
            check_input(configured(**given).data)
    with pytest.raises(UserError, match=r"data\.path is not set: name the dataset"):
        check_input(configured(source="huggingface").data)


def test_several_sources(configured: Callable[..., Config], dataset: Path, tmp_path: Path) -> None:
    rows = [f"line {i} of the book" for i in range(40)] + ["review number 7"]
    (tmp_path / "book.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sources = {
        "reviews": {
            "source": "huggingface",
            "path": str(dataset),
            "text_column": "body",
            "weight": 2,
            "license": "MIT",
        },
        "book": {"path": str(tmp_path / "book.jsonl"), "license": "CC-BY-4.0", "min_characters": 16, "weight": 0.5},
    }
    config = configured(sources=sources, vocab_size=300)
    folder = prepare(config)
    manifest = verify(folder)
    assert manifest.license == "CC-BY-4.0, MIT"
    assert [*manifest.origins] == ["reviews", "book"]
    assert sum(manifest.origins["reviews"]["documents"].values()) == 100
    assert sum(manifest.origins["book"]["documents"].values()) == 40
    assert manifest.origins["book"]["skipped"] == {"shorter than data.min_characters": 1}  # "review number 7"
    assert {s["source"] for s in manifest.read_sources(folder)} == {"reviews", "book"}
    split = Split.open(folder, "train")
    assert [*split.by_source()] == ["reviews", "book"]
    assert sum(part.num_tokens for part in split.by_source().values()) == split.num_tokens
    other_weights = {name: own | {"weight": 1} for name, own in sources.items()}
    assert prepare(replace(config, data__sources=other_weights)) == folder
    for wrong, message in (
        (
            {"a": {"path": "x", "wieght": 2}},
            r"data\.sources\.a\.wieght is not an option of a source; did you mean 'weight'",
        ),
        ({"a": {"path": "x", "weight": 0}}, r"data\.sources\.a\.weight=0 is not a weight"),
        ({"a": {"path": 3}}, r"data\.sources\.a\.path=3 is not a text"),
        ({"a": {"source": "file"}}, r"data\.sources\.a\.source=file is not one of .*did you mean 'files'"),
        ({"a": "x"}, r"data\.sources\.a is not a source"),
        ({"a": {"source": "huggingface"}}, r"with data\.sources\.a\.path="),
    ):
        with pytest.raises(UserError, match=message):
            configured(sources=wrong)
    with pytest.raises(UserError, match="are for text without labels"):
        configured(sources=sources, label_column="stars")

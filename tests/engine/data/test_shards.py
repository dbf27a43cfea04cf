import pickle
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.data.kinds.labeled_text import LabeledText
from engine.data.manifest import Manifest
from engine.data.shards import ShardWriter, Split
from engine.hashing import sha256_file


def write(
    folder: Path, documents: list[np.ndarray], labels: list[int] | None = None, vocab_size: int = 5000, closing: int = 0
) -> Path:
    write_file = lambda name, content: (folder / name).write_bytes(content)  # noqa: E731
    columns = () if labels is None else LabeledText(DataConfig()).stored_columns
    writer = ShardWriter(write_file, "train", vocab_size, 100, columns)
    for i, document in enumerate(documents):
        writer.add(document, np.array([len(document)]), {"label": [labels[i]]} if labels else None)
    shards = [shard | {"source": "files"} for shard in writer.close()]
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "sources.jsonl").write_text("")
    Manifest(
        name="small", kind="text" if labels is None else "labelled", origins={"files": {}}, seed=0, config={},
        sources={"file": "sources.jsonl", "files": 0, "bytes": 0, "sha256": sha256_file(folder / "sources.jsonl")},
        tokenizer=sha256_file(folder / "tokenizer" / "tokenizer.json"), vocab_size=vocab_size, eos_id=0, pad_id=1,
        closing_tokens=closing, labels=[] if labels is None else ["a", "b"],
        splits={"train": {"shards": shards, "documents": len(documents), "tokens": sum(map(len, documents))}},
    ).save(folder)  # fmt: skip
    return folder


def test_token_range_concatenates_the_documents(tmp_path: Path, rows: list[np.ndarray]) -> None:
    split = Split.open(write(tmp_path, rows), "train")
    whole = np.concatenate(rows)
    assert len(split.manifest.splits["train"]["shards"]) == 6
    assert (split.num_rows, split.num_tokens, len(split)) == (11, 688, 11)
    assert split.lengths.tolist() == [len(d) for d in rows]
    assert all(np.array_equal(split.document(i), d) for i, d in enumerate(rows))
    for start in range(0, 688, 13):
        for stop in range(start + 1, 689, 29):
            assert np.array_equal(split.token_range(start, stop), whole[start:stop])
    for bad in [(0, 689), (5, 5), (-1, 3)]:
        with pytest.raises(IndexError):
            split.token_range(*bad)
    with pytest.raises(IndexError):
        split.document(11)


def test_reads_within_a_shard_do_not_copy(tmp_path: Path, rows: list[np.ndarray]) -> None:
    split = Split.open(write(tmp_path, rows), "train")
    assert np.shares_memory(split.token_range(0, 50), split.token_range(0, 100))
    assert not split.token_range(0, 50).flags.writeable
    assert split.token_range(0, 50).dtype == np.uint16
    again = pickle.loads(pickle.dumps(split))
    assert np.array_equal(again.token_range(90, 300), split.token_range(90, 300))


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    split = Split.open(write(tmp_path, [np.array([70_000, 2, 131_071])], vocab_size=131_072), "train")
    assert split.token_range(0, 3).dtype == np.uint32
    assert split.token_range(0, 3).tolist() == [70_000, 2, 131_071]


def test_opening_is_cheap(tmp_path: Path) -> None:
    folder = write(tmp_path, [np.full(100, 7)] * 500)
    split = Split.open(folder, "train")
    assert split.token_range(49_990, 50_000).tolist() == [7] * 10
    assert len(split._open) == 1  # of its files

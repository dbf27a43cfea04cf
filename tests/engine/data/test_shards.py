import pickle
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.data.kinds.labeled_text import LabeledRows, LabeledText
from engine.data.manifest import Manifest
from engine.data.packing import Blocks, Packing, pack
from engine.data.remote_store import verify
from engine.data.shards import ShardWriter, Split
from engine.errors import UserError
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


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 5000, size) for size in [3, 40, 57, 1, 99, 100, 250, 12, 7, 88, 31]]


def test_token_range_concatenates_the_documents(tmp_path: Path, documents: list[np.ndarray]) -> None:
    split = Split.open(write(tmp_path, documents), "train")
    whole = np.concatenate(documents)
    assert len(split.manifest.splits["train"]["shards"]) == 6
    assert (split.num_rows, split.num_tokens, len(split)) == (11, 688, 11)
    assert split.lengths.tolist() == [len(d) for d in documents]
    assert all(np.array_equal(split.document(i), d) for i, d in enumerate(documents))
    for start in range(0, 688, 13):
        for stop in range(start + 1, 689, 29):
            assert np.array_equal(split.token_range(start, stop), whole[start:stop])
    for bad in [(0, 689), (5, 5), (-1, 3)]:
        with pytest.raises(IndexError):
            split.token_range(*bad)
    with pytest.raises(IndexError):
        split.document(11)


def test_reads_within_a_shard_do_not_copy(tmp_path: Path, documents: list[np.ndarray]) -> None:
    split = Split.open(write(tmp_path, documents), "train")
    assert np.shares_memory(split.token_range(0, 50), split.token_range(0, 100))
    assert not split.token_range(0, 50).flags.writeable
    assert split.token_range(0, 50).dtype == np.uint16
    again = pickle.loads(pickle.dumps(split))
    assert np.array_equal(again.token_range(90, 300), split.token_range(90, 300))


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    split = Split.open(write(tmp_path, [np.array([70_000, 2, 131_071])], vocab_size=131_072), "train")
    assert split.token_range(0, 3).dtype == np.uint32
    assert split.token_range(0, 3).tolist() == [70_000, 2, 131_071]


def test_blocks_overlap_by_one_target(tmp_path: Path, documents: list[np.ndarray]) -> None:
    split, whole = Split.open(write(tmp_path, documents), "train"), np.concatenate(documents)
    blocks = Blocks(split, 64)
    assert len(blocks) == 687 // 64 == 10
    assert blocks[9]["tokens"].dtype == np.int64
    assert np.array_equal(np.concatenate([blocks[i]["tokens"][:-1] for i in range(10)]), whole[:640])
    assert all(blocks[i]["tokens"][-1] == whole[64 * (i + 1)] for i in range(10))
    assert len(Blocks(split, 687)) == 1
    with pytest.raises(IndexError):
        blocks[10]
    with pytest.raises(UserError, match=r"688 tokens, fewer than one block of 688 .*data\.sequence_length=687"):
        Blocks(split, 688)
    with pytest.raises(UserError, match="has no labels"):
        LabeledRows(split, 8)


def test_rows_keep_their_closing_tokens(tmp_path: Path, documents: list[np.ndarray]) -> None:
    labels = [i % 2 for i in range(len(documents))]
    split = Split.open(write(tmp_path, documents, labels, closing=1), "train")
    rows = LabeledRows(split, 50)
    assert len(rows) == 11
    assert [rows[i]["label"] for i in range(11)] == labels == split.labels.tolist()
    assert rows[0]["tokens"].tolist() == documents[0].tolist()
    assert rows[6]["tokens"].tolist() == [*documents[6][:49], documents[6][-1]]
    with pytest.raises(UserError, match="texts with labels, which are not packed"):
        pack(split, 8, Packing(), overlap=1)


def test_a_flipped_byte_is_named(tmp_path: Path, documents: list[np.ndarray]) -> None:
    folder = write(tmp_path, documents)
    assert verify(folder).hash == Manifest.load(folder).content_hash()
    path = folder / "train-00002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00002\.arrow was changed"):
        verify(folder)


def test_a_missing_or_short_shard_is_named(tmp_path: Path, documents: list[np.ndarray]) -> None:
    folder = write(tmp_path, documents)
    path = folder / "train-00001.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"train-00001\.arrow is [\d,]+ bytes long, not"):
        Split.open(folder, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001\.arrow is missing"):
        Manifest.load(folder)


def test_missing_folders_and_splits(tmp_path: Path, documents: list[np.ndarray]) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        Split.open(tmp_path, "train")
    with pytest.raises(UserError, match=r"no test documents: .*data\.test_path"):
        Split.open(write(tmp_path, documents), "test")
    (tmp_path / "manifest.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match="is damaged"):
        Manifest.load(tmp_path)


def test_opening_is_cheap(tmp_path: Path) -> None:
    folder = write(tmp_path, [np.full(100, 7)] * 500)
    split = Split.open(folder, "train")
    assert split.token_range(49_990, 50_000).tolist() == [7] * 10
    assert len(split._open) == 1  # of its files

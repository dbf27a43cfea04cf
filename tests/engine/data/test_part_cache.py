from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.data.document import Part
from engine.data.kinds import kind_class
from engine.data.part_cache import PartCache
from engine.data.scan import Scan


@pytest.fixture
def part() -> Part:
    config = DataConfig()
    return Part(3, "files", config, (), kind_class("text")(config))


@pytest.fixture
def scan() -> Scan:
    return Scan(
        digests=np.arange(6, dtype=np.uint64).reshape(3, 2),
        splits=np.array([0, 1, 0], np.uint8),
        labels=["x", "O", "B-PER"],
        label_counts=np.array([1, 0, 2], np.int32),
        origins=np.array([0, 0, 1], np.int32),
        files=[{"path": "a", "sha256": "0", "bytes": 3}, {"path": "b"}],
        texts=["Zo\u00eb", None, ""],
        skipped=Counter({"empty": 2}),
        masked=Counter({"emails": 1}),
        spans=[((0, 3, "x"),), (), ((0, 1, "O"), (1, 2, "B-PER"))],
    )


def test_a_scan_survives_a_round_trip(tmp_path: Path, part: Part, scan: Scan) -> None:
    cache = PartCache(tmp_path)
    assert cache.get_scan(part) is None
    cache.put_scan(part, scan)
    read = cache.get_scan(part)
    assert read is not None
    for name in ("digests", "splits", "label_counts", "origins"):
        np.testing.assert_array_equal(getattr(read, name), getattr(scan, name))
    for name in ("labels", "files", "texts", "skipped", "masked", "spans"):
        assert getattr(read, name) == getattr(scan, name)
    assert read.labels_by_document() == [["x"], [], ["O", "B-PER"]]


def test_a_damaged_scan_is_absent(tmp_path: Path, part: Part, scan: Scan) -> None:
    cache = PartCache(tmp_path)
    cache.put_scan(part, scan)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert cache.get_scan(part) is None


def test_shards_count_only_if_they_are_unchanged(tmp_path: Path, part: Part) -> None:
    from engine.hashing import sha256_file

    shard = tmp_path / "train-00003-00000.arrow"
    shard.write_bytes(b"tokens")
    facts = {"train": [{"file": shard.name, "sha256": sha256_file(shard)}], "validation": [], "test": []}
    cache = PartCache(tmp_path)
    cache.put_shards(part, facts)
    assert cache.get_shards(part) == facts
    shard.write_bytes(b"token?")
    assert cache.get_shards(part) is None


def test_clear_keeps_the_shards(tmp_path: Path, part: Part, scan: Scan) -> None:
    cache, shard = PartCache(tmp_path), tmp_path / "train-00003-00000.arrow"
    shard.write_bytes(b"tokens")
    cache.put_scan(part, scan)
    cache.put_shards(part, {"train": []})
    cache.clear()
    assert list(tmp_path.iterdir()) == [shard]

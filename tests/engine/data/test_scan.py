from collections import Counter

import numpy as np

from engine.config import DataConfig
from engine.data.document import Part
from engine.data.kinds import kind_class
from engine.data.scan import DROPPED, Scan, SmallestSample, is_first_occurrence, sampled_texts, select_documents


def part_of(number: int, config: DataConfig, kind: str) -> Part:
    return Part(number, "files", config, (), kind_class(kind)(config))


def scan_of(digests: list[int], splits: list[int], labels: list[list[str]] | None = None) -> Scan:
    return Scan(
        digests=np.array([[digest, 0] for digest in digests], np.uint64),
        splits=np.array(splits, np.uint8),
        labels=[label for own in labels or [] for label in own],
        label_counts=np.array([len(own) for own in labels or []], np.int32),
        origins=np.zeros(len(digests), np.int32),
        files=[{"path": "a"}],
        texts=[f"text {digest}" for digest in digests],
        skipped=Counter(),
        masked=Counter(),
    )


def test_first_occurrences() -> None:
    digests = np.array([[1, 2], [1, 3], [1, 2], [0, 9], [1, 3]], np.uint64)
    assert is_first_occurrence(digests).tolist() == [True, True, False, True, False]


def test_the_sample_has_the_texts_of_smallest_rank() -> None:
    sample = SmallestSample(25)
    for number, rank in enumerate([5, 3, 9, 1, 7]):
        sample.add(number, rank, "x" * 10)
    assert sorted(number for number, _ in sample) == [0, 1, 3]


def test_duplicates_are_dropped_across_parts() -> None:
    config = DataConfig(path="in", validation_fraction=0.0, test_fraction=0.0)
    parts = [part_of(0, config, "text"), part_of(1, config, "text")]
    scans = [scan_of([1, 2], [0, 2]), scan_of([2, 3, 3], [0, 0, 0])]
    selection = select_documents(parts, scans, seed=0)
    assert [splits.tolist() for splits in selection.splits] == [[0, 2], [DROPPED, 0, DROPPED]]
    assert selection.skipped["files"]["duplicate"] == 2
    assert selection.documents == {"train": 2, "validation": 0, "test": 1}
    assert sampled_texts(scans, selection) == ["text 1", "text 3"]


def test_held_out_documents_have_labels_of_training() -> None:
    config = DataConfig(path="in", label_column="label", validation_fraction=0.0, test_fraction=0.0)
    scans = [scan_of([1, 2, 3, 4], [0, 0, 2, 2], [["10"], ["9", "10"], ["9"], ["9", "11"]])]
    selection = select_documents([part_of(0, config, "token_labels")], scans, seed=0)
    assert selection.labels == ["9", "10"]  # numbers sort as numbers
    assert selection.splits[0].tolist() == [0, 0, 2, DROPPED]
    assert selection.skipped["files"]["label that is not in the training data"] == 1

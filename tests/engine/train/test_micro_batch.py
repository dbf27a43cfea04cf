"""The largest micro-batch: extrapolated from measured memory, and cached."""

from __future__ import annotations

from pathlib import Path

from engine.train.micro_batch import CACHE_FILE, max_samples, num_elements, read_cached, write_cached


def test_max_samples_extrapolates_linearly() -> None:
    assert max_samples(one_bytes=1000, three_bytes=1400, budget_bytes=2000) == 6
    assert max_samples(one_bytes=1000, three_bytes=1400, budget_bytes=500) == 1
    assert max_samples(one_bytes=1000, three_bytes=1000, budget_bytes=1e6) > 10_000


def test_a_micro_batch_is_cached_for_the_same_facts_only(tmp_path: Path) -> None:
    file = tmp_path / CACHE_FILE
    facts = {"machine": "m", "model.type": "llama", "zero.stage": 2}
    assert read_cached(file, facts) == 0
    write_cached(file, facts, 7)
    write_cached(file, facts | {"zero.stage": 3}, 9)
    assert read_cached(file, facts) == 7
    assert read_cached(file, facts | {"machine": "another"}) == 0
    file.write_text("{")
    assert read_cached(file, facts) == 0


def test_the_size_of_a_sample_counts_all_its_arrays() -> None:
    assert num_elements({"tokens": [1, 2, 3], "label": 4}) == 4

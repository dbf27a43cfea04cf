import statistics
from itertools import pairwise

import pytest

from engine.config import DataConfig
from engine.data.document import evenly_spaced, hash_fraction, split_of


def test_hash_fraction_is_uniform_and_pure() -> None:
    values = [hash_fraction("split", 0, i) for i in range(20_000)]
    assert all(0 <= v < 1 for v in values)
    assert abs(statistics.mean(values) - 0.5) < 0.01
    assert abs(sum(v < 0.05 for v in values) / 20_000 - 0.05) < 0.006
    assert hash_fraction("split", 0, 7) == values[7] != hash_fraction("split", 1, 7)


def test_changing_one_fraction_moves_nothing_between_held_out_splits() -> None:
    small, large = (
        DataConfig(validation_fraction=0.1, test_fraction=0.05),
        DataConfig(validation_fraction=0.1, test_fraction=0.2),
    )
    for i in range(2000):
        before, after = split_of(str(i), 0, small), split_of(str(i), 0, large)
        assert before == after or (before, after) == ("train", "test")


@pytest.mark.parametrize(("size", "wanted"), [(10, 10), (10, 3), (7, 6), (1000, 64), (5, 9)])
def test_evenly_spaced(size: int, wanted: int) -> None:
    chosen = evenly_spaced(size, wanted)
    assert len(set(chosen)) == len(chosen) == min(size, wanted)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert max(gaps) - min(gaps) <= 1

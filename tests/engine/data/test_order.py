import time

import numpy as np
import pytest

from engine.data.order import DataOrder, add_hashes, hash_hex, ids_hash, permute, splitmix64
from engine.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 4097, 65536, 100_003])
def test_permutation_is_a_bijection(size: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**63, 10**9)]:
        assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


def test_permutation_is_keyed_and_looks_random() -> None:
    size = 10_000
    first, second, other = (
        permute(np.arange(size), size, 0, 0),
        permute(np.arange(size), size, 0, 1),
        permute(np.arange(size), size, 1, 0),
    )
    for a, b in [(first, second), (first, other), (second, other), (first, np.arange(size))]:
        assert (a == b).mean() < 0.002  # expected: 1 / 10,000
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # standard error: 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def test_splitmix64_matches_the_reference() -> None:
    # First outputs of https://prng.di.unimi.it/splitmix64.c seeded with 1234567.
    states = (1234567 + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(("size", "batch"), [(10, 10), (10, 3), (1000, 7), (257, 64)])
def test_each_id_is_seen_once_per_epoch(size: int, batch: int) -> None:
    order = DataOrder(size, batch, seed=3)
    seen = np.concatenate([order.sample_ids(step) for step in range(4 * size // batch + 1)])
    for epoch in range(4):
        assert np.array_equal(np.sort(seen[epoch * size : (epoch + 1) * size]), np.arange(size))


def test_samples_are_a_pure_function_of_the_step() -> None:
    assert np.array_equal(DataOrder(1000, 8, 0).sample_ids(10**6), DataOrder(1000, 8, 0).sample_ids(10**6))
    assert DataOrder(1000, 8, 0).sample_ids(0).dtype == np.int64
    assert not np.array_equal(DataOrder(1000, 8, 0).sample_ids(5), DataOrder(1000, 8, 1).sample_ids(5))


def test_late_steps_cost_as_much_as_the_first() -> None:
    order = DataOrder(10**12, 256, 0)

    def seconds(step: int) -> float:
        start = time.process_time()
        for _ in range(50):
            order.sample_ids(step)
        return time.process_time() - start

    seconds(0)
    first, late = (min(seconds(step) for _ in range(5)) for step in (1, 10**6))
    assert late < 5 * first + 0.05  # by counting on from the first it would be 10**6 times that


def test_hash_proves_that_each_id_was_seen_once() -> None:
    order, size = DataOrder(96, 8, 5), 96
    ranks = [[ids_hash(order.sample_ids(step)[rank::2]) for step in range(12)] for rank in range(2)]
    whole = ids_hash(np.arange(size))
    assert add_hashes([add_hashes(rank) for rank in ranks]) == whole
    assert add_hashes(ids_hash(order.sample_ids(step)) for step in range(24)) == add_hashes([whole, whole])
    missing, twice = np.arange(size - 1), np.r_[np.arange(size - 1), 3]
    assert whole not in (ids_hash(missing), ids_hash(twice))


def test_hashes_wrap_as_int64_tensors_do() -> None:
    hashes = [ids_hash(np.array([i])) for i in range(1000)]
    assert all(-(2**63) <= h < 2**63 for h in hashes)
    with np.errstate(over="ignore"):
        assert add_hashes(hashes) == int(np.array(hashes, np.int64).sum())
    assert add_hashes([2**63 - 1, 1]) == -(2**63)
    assert hash_hex(-1) == "f" * 16
    assert ids_hash(np.array([], np.int64)) == 0


def test_fewer_samples_than_a_batch_names_both_and_the_fix() -> None:
    with pytest.raises(UserError, match=r"12 samples, fewer than one batch of 32: use train\.global_batch=12 or less"):
        DataOrder(12, 32, 0)

"""The data order: which samples form step s, as a pure function of (size, seed, global batch, s), with no other state.

Each epoch is a keyed permutation of the samples (a Feistel network with cycle walking: Black & Rogaway 2002, "Ciphers
with Arbitrary Finite Domains"), so that step 1,000,000 costs as much as step 1 and memory doesn't grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.errors import UserError

ROUNDS = 8
U64 = np.uint64
WRAP = 2**64
GAMMA = U64(0x9E3779B97F4A7C15)
MIXING = (U64(30), U64(0xBF58476D1CE4E5B9)), (U64(27), U64(0x94D049BB133111EB))
LAST_SHIFT = U64(31)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers (Steele, Lea & Flood 2014; constants of https://prng.di.unimi.it/splitmix64.c)."""
    z = np.atleast_1d(values).astype(U64)  # arrays wrap around without a warning, scalars don't
    z += GAMMA
    for shift, factor in MIXING:
        z ^= z >> shift
        z *= factor
    z ^= z >> LAST_SHIFT
    return z


def permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Map positions in [0, size) one to one onto [0, size), keyed by seed and epoch."""
    half = U64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = (U64(1) << half) - U64(1)
    key = splitmix64(splitmix64(np.array([seed % WRAP], U64)) ^ np.array([epoch % WRAP], U64))
    keys = splitmix64(key ^ np.arange(1, ROUNDS + 1, dtype=U64))

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (splitmix64(right ^ k) & low)
        return (left << half) | right

    out = network(positions.astype(U64))
    while (outside := out >= U64(size)).any():  # its domain is less than 8 times the size: few walks
        out[outside] = network(out[outside])
    return out.astype(np.int64)


class DataOrder:
    """Epoch after epoch, each sample once in each, one global batch a step (a batch may span two epochs)."""

    def __init__(self, size: int, global_batch: int, seed: int, endless: bool = False) -> None:
        """Raise UserError where there are fewer samples than one batch.

        `endless`: sample i of epoch e has the id i + e * size, as a `Mix` needs it.
        """
        if size < global_batch:
            raise UserError(
                f"the data has {size:,} samples, fewer than one batch of {global_batch:,}: "
                f"use train.global_batch={max(size, 1)} or less, a smaller data.sequence_length, or more data"
            )
        self.size, self.global_batch, self.seed, self.endless = size, global_batch, seed, endless

    def sample_ids(self, step: int) -> np.ndarray:
        """Return the sample indices of a step: int64 [global_batch]."""
        epoch, start = divmod(step * self.global_batch, self.size)
        positions = start + np.arange(self.global_batch, dtype=np.int64)
        ids = []
        for e, in_epoch in (
            (epoch, positions[positions < self.size]),
            (epoch + 1, positions[positions >= self.size] - self.size),
        ):
            if len(in_epoch):
                first = e * self.size if self.endless else 0
                ids.append(first + permute(in_epoch, self.size, self.seed, e))
        return np.concatenate(ids)

    def sample_seeds(self, step: int) -> np.ndarray:
        """Return a random seed for each sample of a step's batch: uint64 [global_batch], new each step, equal in any layout."""
        positions = step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)
        return splitmix64(splitmix64(positions) ^ splitmix64(np.array([self.seed % WRAP], U64)))


def ids_hash(ids: np.ndarray) -> int:
    """Return the sum modulo 2**64 of splitmix64 of each id, as a signed int64.

    A sum does not depend on the order: in any layout ranks add up theirs (`add_hashes`, or an all_reduce SUM of int64
    tensors, which wraps around too) and get the hash of the whole. After k epochs it must be k times `ids_hash(arange(size))`
    modulo 2**64 or, where the order is endless, `ids_hash(arange(k * size))`; a sample that is missed or repeated changes
    it, except with a probability of 2**-64.
    """
    return _signed(int(splitmix64(np.asarray(ids)).sum(dtype=U64)))


def add_hashes(hashes: Iterable[int]) -> int:
    """Add hashes with wrap-around, as int64 tensors do."""
    return _signed(sum(hashes))


def hash_hex(value: int) -> str:
    """Return a hash as 16 hexadecimal digits."""
    return f"{value % WRAP:016x}"


def _signed(value: int) -> int:
    return (value + WRAP // 2) % WRAP - WRAP // 2

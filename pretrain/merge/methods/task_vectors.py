"""Sparse task vectors: which entries of (model - base) a method keeps, encoded as thresholds and DARE keys.

numpy's passes and the compiled passes both read this encoding and keep the same entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods.blocks import Block

ELEMENTS_PER_KEY = 1 << 16  # consecutive elements that share one hash key; LATTICE in difference.c


@dataclass(frozen=True)
class Threshold:
    """Selects the entries whose magnitude key is above `key`, and those before element `end` whose key equals it.

    A magnitude key is the bits of abs(entry) as float32. Keys sort as the magnitudes do; all NaN have the same key,
    above infinity.
    """

    key: int
    end: int


NO_ENTRIES = Threshold(0x7FFFFFFF, 0)  # above every key


@dataclass(frozen=True)
class SparseTaskVector:
    """The entries of x - base that a method keeps, where x is the term; all others are zero.

    dare:     key of `dare_mask`, which keeps entries at random; None keeps all.
    kept:     keeps the entries that this threshold selects; None keeps all.
    outliers: removes the entries that this threshold selects (the largest ones); None removes none.
    """

    term: Term
    dare: bytes | None = None
    kept: Threshold | None = None
    outliers: Threshold | None = None


def dare_key(seed: int, name: str, source: int) -> bytes:
    """Hash key of a tensor's DARE mask, from the seed, the tensor's name and the index of the model."""
    return f"{seed}/{source}/{name}".encode()


def dare_mask(key: bytes, density: float, block: Block) -> np.ndarray:
    """bool [len(block)]: True with probability `density` (in steps of 2**-32), independently per element."""
    start, stop = block.start, block.stop
    stays = block.array("stays", bool)
    for group in range(start // ELEMENTS_PER_KEY, -(-stop // ELEMENTS_PER_KEY)):
        first = group * ELEMENTS_PER_KEY
        low, high = max(start, first), min(stop, first + ELEMENTS_PER_KEY)
        number = block.scratch.take("number", np.uint32, high - low)
        number[:] = np.arange(low - first, high - first, dtype=np.uint32)
        hashed = _mix(number, xxhash.xxh64_intdigest(key, group), block)
        np.less(hashed, np.uint32(dare_threshold(density)), out=stays[low - start : high - start])
    return stays


def dare_block_keys(key: bytes, start: int, stop: int) -> np.ndarray:
    """uint64 hash keys of all groups of ELEMENTS_PER_KEY that overlap [start, stop), for the compiled passes."""
    groups = range(start // ELEMENTS_PER_KEY, -(-stop // ELEMENTS_PER_KEY))
    return np.array([xxhash.xxh64_intdigest(key, group) for group in groups], np.uint64)


def dare_threshold(density: float) -> int:
    """DARE keeps an element if its hash is below this number."""
    return min(round(density * 2**32), 2**32 - 1)


def _mix(number: np.ndarray, key: int, block: Block) -> np.ndarray:
    """Keyed integer hash of `number`, in place: `lowbias32` of hash-prospector (two multiply-xorshift rounds)."""
    shifted = block.scratch.take("shifted", np.uint32, len(number))
    np.bitwise_xor(number, np.uint32(key & 0xFFFFFFFF), out=number)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        np.right_shift(number, shift, out=shifted)
        np.bitwise_xor(number, shifted, out=number)
        np.multiply(number, np.uint32(factor), out=number)
    np.add(number, np.uint32(key >> 32), out=number)
    np.right_shift(number, 16, out=shifted)
    np.bitwise_xor(number, shifted, out=number)
    return number

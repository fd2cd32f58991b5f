"""What is left of a difference between a model and its base, said in a few numbers that any pass can go by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods.blocks import Block

LATTICE = 1 << 16
"""elements that share a key"""


@dataclass(frozen=True)
class Threshold:
    """The largest entries of a difference: keys above `key`, and those equal to it before element `end`.

    A key is the bits of the magnitude as float32; they sort as the numbers do, NaN last and all alike.
    """

    key: int
    end: int


NOTHING = Threshold(0x7FFFFFFF, 0)
"""no entry is that large"""


@dataclass(frozen=True)
class SparseTaskVector:
    """Of x - base, x the term: the other entries are zero.

    key: of pretrain.merge.methods.dare, the entries chosen by it stay; None where nothing is dropped at random.
    cut: the entries in it stay; None where nothing is trimmed.
    top: the entries in it go, as they are too large; None where nothing is.
    """

    term: Term
    key: bytes | None = None
    cut: Threshold | None = None
    top: Threshold | None = None


def dare_key(seed: int, name: str, source: int) -> bytes:
    """What the choice depends on besides the element's number: seed, name of the tensor, place of the model."""
    return f"{seed}/{source}/{name}".encode()


def dare_mask(key: bytes, density: float, block: Block) -> np.ndarray:
    """Of the block's elements, True with probability `density` (in steps of 2**-32), each on its own."""
    start, stop = block.start, block.stop
    stays = block.array("stays", bool)
    for lattice in range(start // LATTICE, -(-stop // LATTICE)):
        first = lattice * LATTICE
        low, high = max(start, first), min(stop, first + LATTICE)
        number = block.scratch.take("number", np.uint32, high - low)
        number[:] = np.arange(low - first, high - first, dtype=np.uint32)
        hashed = _mix(number, xxhash.xxh64_intdigest(key, lattice), block)
        np.less(hashed, np.uint32(dare_threshold(density)), out=stays[low - start : high - start])
    return stays


def dare_block_keys(key: bytes, start: int, stop: int) -> np.ndarray:
    """Of every lattice that elements [start, stop) lie in, uint64: what a compiled pass asks for."""
    lattices = range(start // LATTICE, -(-stop // LATTICE))
    return np.array([xxhash.xxh64_intdigest(key, lattice) for lattice in lattices], np.uint64)


def dare_threshold(density: float) -> int:
    """An element stays whose hash is less."""
    return min(round(density * 2**32), 2**32 - 1)


def _mix(number: np.ndarray, key: int, block: Block) -> np.ndarray:
    """A keyed integer hash: two multiplications, each between shifts, constants of hash-prospector's `lowbias32`."""
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

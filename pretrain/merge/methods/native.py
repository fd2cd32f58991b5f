"""Compiled passes: a method's arithmetic in one C pass over a block, with the same bits as numpy's many passes.

Without a C compiler at installation, `compiled_function` returns None and numpy computes everything.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from data_pipeline.native import load_function
from pretrain.merge.merge_plan import Term
from pretrain.merge.methods import task_vectors
from pretrain.merge.methods.blocks import Block
from pretrain.merge.methods.task_vectors import SparseTaskVector
from pretrain.weights.dtypes import FLOATS, Accumulator

# A compiled pass processes this many of numpy's blocks at once: it stores only the result, and writing costs more time
# than the arithmetic (measured with blocks of 128 KiB: 0.85 s; four times that: 0.5 s; sixteen times: 1.5 s).
BLOCKS_PER_PASS = 4
ELEMENTS_PER_TILE = 512  # TILE in numbers.h
MAX_VECTORS = 16  # of `products`; MOST in products.c

# Writes a block's elements, as stored, to an array. Returns True if one of them is infinite or NaN.
FusedPass = Callable[[Block, np.ndarray], bool]

_POINTER, _INT, _SIZE, _REAL, _U64 = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_double, ctypes.c_uint64,
)  # fmt: skip
_TENSOR_AND_BASE = (_POINTER, _INT, _POINTER, _INT)
_BASE_AND_VECTORS = (_POINTER, _INT, _POINTER, _INT, _U64, _SIZE, _POINTER, _INT)
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (_INT, (_POINTER, _POINTER, _POINTER, _INT, _SIZE, _POINTER, _INT)),
    "arithmetic": (_INT, _BASE_AND_VECTORS),
    "consensus": (_INT, (*_BASE_AND_VECTORS, _REAL, _INT, _POINTER)),
    "norms": (None, (_POINTER, _POINTER, _INT, _U64, _SIZE, _SIZE, _POINTER)),
    "histogram": (None, (*_TENSOR_AND_BASE, _SIZE, _INT, _POINTER)),
    "place": (_SIZE, (*_TENSOR_AND_BASE, _SIZE, ctypes.c_uint32, _U64, _POINTER)),
    "products": (None, (_POINTER, _POINTER, _INT, _POINTER, _INT, _SIZE, _SIZE, _POINTER)),
}


class Difference(ctypes.Structure):
    """One sparse task vector, in the layout of the struct `Term` in difference.c."""

    _fields_ = (
        ("stored", _POINTER), ("keys", _POINTER), ("factor", _REAL), ("weight", _REAL), ("cut", ctypes.c_int64),
        ("end", ctypes.c_int64), ("top", ctypes.c_int64), ("top_end", ctypes.c_int64), ("below", ctypes.c_uint32),
        ("dtype", _INT),
    )  # fmt: skip


def compiled_function(name: str, kind: Accumulator | None = None) -> Any:
    """The C function `name`; None if it was not built.

    kind: accumulation type; None for a function that exists for fp64 only.
    """
    return _load(name, "" if kind is None else "_float" if kind is np.float32 else "_double")


@cache
def _load(name: str, suffix: str) -> Any:
    function = (
        load_function(__file__, "_passes", f"dromos_{name}{suffix}") if sys.byteorder == "little" else None
    )
    if function is not None:
        function.restype, function.argtypes = SIGNATURES[name]
    return function


def _stored_array(term: Term, block: Block) -> tuple[np.ndarray, int]:
    """A term's stored elements, whose memory the block holds; and the number of its dtype."""
    dtype = block.sources[term.source].info(term.name)[0]
    return block.stored(term), FLOATS.index(dtype)


def linear_pass(
    terms: Sequence[Term], factors: Sequence[np.floating], kind: Accumulator, dtype: str
) -> FusedPass | None:
    """sum_i f_i x_i, rounded to `dtype`."""
    function = compiled_function("linear", kind)
    if function is None:
        return None
    scales = np.array(factors, np.float64)

    def run(block: Block, out: np.ndarray) -> bool:
        arrays = [_stored_array(term, block) for term in terms]
        inputs = _pointers(arrays), _dtypes(arrays), scales.ctypes.data, len(arrays)
        return bool(function(*inputs, len(out), out.ctypes.data, FLOATS.index(dtype)))

    return run


@dataclass(frozen=True)
class SignElection:
    """Parameters of `sparsify.elected_sum`.

    scale:   factor of the elected sum.
    weights: each entry is divided by the sum of the weights that agree with the elected sign; None: not divided.
    """

    scale: np.floating
    weights: Sequence[np.floating] | None


def task_vector_pass(
    vectors: Sequence[SparseTaskVector],
    factors: Sequence[np.floating],
    base: Term,
    election: SignElection | None,
    kind: Accumulator,
    dtype: str,
) -> FusedPass | None:
    """base + sum_i f_i d_i, or base + the elected sum of f_i d_i, rounded to `dtype`; d_i: sparse task vectors."""
    function = compiled_function("arithmetic" if election is None else "consensus", kind)
    if function is None:
        return None
    weights = election.weights if election is not None else None

    def run(block: Block, out: np.ndarray) -> bool:
        # `_keys` keeps the memory alive that the rows point to.
        (rows, _keys), (base_array, base_dtype) = _rows(vectors, block), _stored_array(base, block)
        for row, factor, weight in zip(rows, factors, weights or factors, strict=True):
            row.factor, row.weight = float(factor), float(weight)
        arguments = (
            rows, len(vectors), base_array.ctypes.data, base_dtype, block.start, len(out), out.ctypes.data,
            FLOATS.index(dtype),
        )  # fmt: skip
        if election is None:
            return bool(function(*arguments))
        work = block.scratch.take("work", kind, ELEMENTS_PER_TILE * len(vectors))
        return bool(function(*arguments, float(election.scale), weights is not None, work.ctypes.data))

    return run


def _rows(vectors: Sequence[SparseTaskVector], block: Block) -> tuple[Any, list[np.ndarray]]:
    """The sparse task vectors as a C array of `Difference`, and the hash keys that it points to."""
    rows, every_key = (Difference * len(vectors))(), []
    for row, vector in zip(rows, vectors, strict=True):
        kept, outliers = vector.kept, vector.outliers
        array, row.dtype = _stored_array(vector.term, block)
        row.stored = array.ctypes.data
        row.cut, row.end = (kept.key, kept.end) if kept is not None else (-1, 0)
        row.top, row.top_end = (outliers.key, outliers.end) if outliers is not None else (-1, 0)
        if vector.dare is not None:
            keys = task_vectors.dare_block_keys(vector.dare, block.start, block.stop)
            row.keys, row.below = keys.ctypes.data, task_vectors.dare_threshold(vector.term.density)
            every_key.append(keys)
    return rows, every_key


def norms(
    vector: SparseTaskVector, base: Term, kind: Accumulator, start: int, count: int, block: Block
) -> tuple[float, float]:
    """L1 norms of the full difference and of the sparse task vector, over `count` elements from element `start` of the
    block."""
    (rows, _keys), (base_array, base_dtype) = _rows([vector], block), _stored_array(base, block)
    sums = (_REAL * 2)()
    function = compiled_function("norms", kind)
    function(rows, base_array.ctypes.data, base_dtype, block.start, start, count, sums)
    return sums[0], sums[1]


def histogram(term: Term, base: Term, kind: Accumulator, high: int, block: Block, out: np.ndarray) -> None:
    """Add the block's magnitude keys of x - base to the histogram `out`, uint32 [65536]: the upper halves, or for
    high >= 0 the lower halves of the keys whose upper half is `high`."""
    (x, x_dtype), (base_array, base_dtype) = _stored_array(term, block), _stored_array(base, block)
    function = compiled_function("histogram", kind)
    function(x.ctypes.data, x_dtype, base_array.ctypes.data, base_dtype, len(block), high, out.ctypes.data)


def nth_equal(
    term: Term, base: Term, kind: Accumulator, key: int, rank: int, block: Block
) -> tuple[int, int]:
    """The element after the block's `rank`-th element with magnitude key `key`, and the number of such keys before."""
    (x, x_dtype), (base_array, base_dtype) = _stored_array(term, block), _stored_array(base, block)
    equal = ctypes.c_uint64()
    function = compiled_function("place", kind)
    inputs = x.ctypes.data, x_dtype, base_array.ctypes.data, base_dtype, len(block)
    return block.start + function(*inputs, key, rank, ctypes.byref(equal)), equal.value


def products(
    terms: Sequence[Term], base: Term | None, start: int, count: int, block: Block
) -> list[list[float]]:
    """Lower triangle of the fp64 Gram matrix of the terms (minus the base, if given).

    Covers `count` elements from element `start` of the block, for at most MAX_VECTORS terms.
    """
    arrays = [_stored_array(term, block) for term in terms]
    base_array, base_dtype = _stored_array(base, block) if base is not None else (None, 0)
    base_pointer = None if base_array is None else base_array.ctypes.data
    sums = (_REAL * (len(terms) * (len(terms) + 1) // 2))()
    inputs = _pointers(arrays), _dtypes(arrays), len(arrays), base_pointer, base_dtype
    compiled_function("products")(*inputs, start, count, sums)
    products = iter(sums)
    return [[next(products) for _ in range(i + 1)] for i in range(len(terms))]


def _pointers(arrays: Sequence[tuple[np.ndarray, int]]) -> Any:
    return (_POINTER * len(arrays))(*(array.ctypes.data for array, _ in arrays))


def _dtypes(arrays: Sequence[tuple[np.ndarray, int]]) -> Any:
    return (_INT * len(arrays))(*(number for _, number in arrays))

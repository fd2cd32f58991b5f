"""The methods' arithmetic in one pass over a block, by small compiled functions; numpy's passes give the same bits."""

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

WIDER = 4
"""times the elements of a block that numpy's passes work on: nothing but the result is held, and writes are dearer
than the arithmetic (four times 128 KiB: 0.5 s where 128 KiB take 0.85 s; sixteen times take 1.5 s)"""
TILE = 512
"""as numbers.h has it"""
VECTORS = 16
"""that `products` takes, MOST in products.c"""

Pass = Callable[[Block, np.ndarray], bool]
"""puts a block's elements, as stored, into an array; whether one of them is not finite"""

_PLACE, _INT, _SIZE, _REAL, _U64 = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_double, ctypes.c_uint64,
)  # fmt: skip
_PAIR = (_PLACE, _INT, _PLACE, _INT)
_BASED = (_PLACE, _INT, _PLACE, _INT, _U64, _SIZE, _PLACE, _INT)
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (_INT, (_PLACE, _PLACE, _PLACE, _INT, _SIZE, _PLACE, _INT)),
    "arithmetic": (_INT, _BASED),
    "consensus": (_INT, (*_BASED, _REAL, _INT, _PLACE)),
    "norms": (None, (_PLACE, _PLACE, _INT, _U64, _SIZE, _SIZE, _PLACE)),
    "histogram": (None, (*_PAIR, _SIZE, _INT, _PLACE)),
    "place": (_SIZE, (*_PAIR, _SIZE, ctypes.c_uint32, _U64, _PLACE)),
    "products": (None, (_PLACE, _PLACE, _INT, _PLACE, _INT, _SIZE, _SIZE, _PLACE)),
}


class Difference(ctypes.Structure):
    """One term, as difference.c explains it."""

    _fields_ = (
        ("stored", _PLACE), ("keys", _PLACE), ("factor", _REAL), ("weight", _REAL), ("cut", ctypes.c_int64),
        ("end", ctypes.c_int64), ("top", ctypes.c_int64), ("top_end", ctypes.c_int64), ("below", ctypes.c_uint32),
        ("dtype", _INT),
    )  # fmt: skip


def compiled(name: str, kind: Accumulator | None = None) -> Any:
    """A function of the C files, of those that there are for both accumulation types that for `kind`; None where
    nothing was built."""
    return _found(name, "" if kind is None else "_float" if kind is np.float32 else "_double")


@cache
def _found(name: str, suffix: str) -> Any:
    found = load_function(__file__, "_passes", f"dromos_{name}{suffix}") if sys.byteorder == "little" else None
    if found is not None:
        found.restype, found.argtypes = SIGNATURES[name]
    return found


def stored(term: Term, block: Block) -> tuple[np.ndarray, int]:
    """A term's elements of a block in one piece, which must outlive the call; and their dtype's number."""
    dtype = block.sources[term.source].info(term.name)[0]
    return np.ascontiguousarray(block.stored(term)), FLOATS.index(dtype)


def linear(terms: Sequence[Term], factors: Sequence[np.floating], kind: Accumulator, dtype: str) -> Pass | None:
    """sum_i f_i x_i, rounded to `dtype`."""
    call = compiled("linear", kind)
    if call is None:
        return None
    scales = np.array(factors, np.float64)

    def run(block: Block, out: np.ndarray) -> bool:
        held = [stored(term, block) for term in terms]
        given = _places(held), _dtypes(held), scales.ctypes.data, len(held)
        return bool(call(*given, len(out), out.ctypes.data, FLOATS.index(dtype)))

    return run


@dataclass(frozen=True)
class Election:
    """The sum of those of the elected sign, times `scale`; with `weights` divided by those of the parts that agree."""

    scale: np.floating
    weights: Sequence[np.floating] | None


def based(
    parts: Sequence[SparseTaskVector],
    factors: Sequence[np.floating],
    base: Term,
    election: Election | None,
    kind: Accumulator,
    dtype: str,
) -> Pass | None:
    """base + sum of factor * part, or what is elected of these, rounded to `dtype`."""
    call = compiled("arithmetic" if election is None else "consensus", kind)
    if call is None:
        return None
    weights = election.weights if election is not None else None

    def run(block: Block, out: np.ndarray) -> bool:
        (rows, _held), (under, number) = _rows(parts, block), stored(base, block)
        for row, factor, weight in zip(rows, factors, weights or factors, strict=True):
            row.factor, row.weight = float(factor), float(weight)
        given = (
            rows, len(parts), under.ctypes.data, number, block.start, len(out), out.ctypes.data, FLOATS.index(dtype),
        )  # fmt: skip
        if election is None:
            return bool(call(*given))
        work = block.scratch.take("work", kind, TILE * len(parts))
        return bool(call(*given, float(election.scale), weights is not None, work.ctypes.data))

    return run


def _rows(parts: Sequence[SparseTaskVector], block: Block) -> tuple[Any, list[Any]]:
    """The parts as difference.c takes them, and the arrays that they point into."""
    rows, held = (Difference * len(parts))(), []
    for row, part in zip(rows, parts, strict=True):
        array, row.dtype = stored(part.term, block)
        row.stored = array.ctypes.data
        row.cut, row.end = (part.cut.key, part.cut.end) if part.cut is not None else (-1, 0)
        row.top, row.top_end = (part.top.key, part.top.end) if part.top is not None else (-1, 0)
        held.append(array)
        if part.key is not None:
            keys = task_vectors.dare_block_keys(part.key, block.start, block.stop)
            row.keys, row.below = keys.ctypes.data, task_vectors.dare_threshold(part.term.density)
            held.append(keys)
    return rows, held


def norms(
    part: SparseTaskVector, base: Term, kind: Accumulator, start: int, count: int, block: Block
) -> tuple[float, float]:
    """L1 norms of the whole difference and of what is left of it: of `count` elements from the block's element `start`
    on."""
    (rows, _held), (under, number) = _rows([part], block), stored(base, block)
    sums = (_REAL * 2)()
    compiled("norms", kind)(rows, under.ctypes.data, number, block.start, start, count, sums)
    return sums[0], sums[1]


def histogram(term: Term, base: Term, kind: Accumulator, high: int, block: Block, out: np.ndarray) -> None:
    """Adds the block's keys of x - base to `out`, uint32 [65536]: upper halves, or for high >= 0 the lower halves of
    keys with that upper one."""
    (x, x_dtype), (under, base_dtype) = stored(term, block), stored(base, block)
    call = compiled("histogram", kind)
    call(x.ctypes.data, x_dtype, under.ctypes.data, base_dtype, len(block), high, out.ctypes.data)


def place(term: Term, base: Term, kind: Accumulator, key: int, wanted: int, block: Block) -> tuple[int, int]:
    """The element after the `wanted`-th of the block whose key is `key`, and how many there are up to it."""
    (x, x_dtype), (under, base_dtype) = stored(term, block), stored(base, block)
    found = ctypes.c_uint64()
    call = compiled("place", kind)
    given = x.ctypes.data, x_dtype, under.ctypes.data, base_dtype, len(block)
    return block.start + call(*given, key, wanted, ctypes.byref(found)), found.value


def products(
    terms: Sequence[Term], base: Term | None, start: int, count: int, block: Block
) -> list[list[float]]:
    """For every term the products of it and of each up to it, less the base where there is one: of `count` elements
    from the block's element `start` on. At most VECTORS terms."""
    held = [stored(term, block) for term in terms]
    under, number = stored(base, block) if base is not None else (None, 0)
    sums = (_REAL * (len(terms) * (len(terms) + 1) // 2))()
    given = _places(held), _dtypes(held), len(held), None if under is None else under.ctypes.data, number
    compiled("products")(*given, start, count, sums)
    found = iter(sums)
    return [[next(found) for _ in range(i + 1)] for i in range(len(terms))]


def _places(held: Sequence[tuple[np.ndarray, int]]) -> Any:
    return (_PLACE * len(held))(*(array.ctypes.data for array, _ in held))


def _dtypes(held: Sequence[tuple[np.ndarray, int]]) -> Any:
    return (_INT * len(held))(*(number for _, number in held))

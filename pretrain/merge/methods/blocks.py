"""Blocks of tensors, and the threads that process them.

A `Block` is one range of elements of all tensors that a job combines. It reads and widens each tensor once, for all
plans that use it. `Workers` runs functions over blocks in threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from pretrain.merge.merge_plan import Term
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, ELEMENTS_PER_SPAN, Accumulator, Scratch, widen_into
from pretrain.weights.source import WeightSource

Item = TypeVar("Item")
Result = TypeVar("Result")


class Block:
    """Elements [start, stop) of the tensors of a job. Each thread owns one block and moves it.

    plans: number of plans that share the widened tensors; with one plan, widened tensors are not cached.
    """

    def __init__(self, sources: Sequence[WeightSource], plans: int = 1) -> None:
        self.sources, self.plans = sources, plans
        self.scratch = Scratch()
        self.start = self.stop = 0
        self._stored: dict[tuple[int, str], np.ndarray] = {}
        self._wide: dict[tuple[int, str, Accumulator], np.ndarray] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def move(self, start: int, stop: int) -> Block:
        """Move to the elements [start, stop), drop everything cached, and return the block itself."""
        self.start, self.stop = start, stop
        self._stored.clear()
        self._wide.clear()
        return self

    def stored(self, term: Term) -> np.ndarray:
        """The stored elements of a term, contiguous and read-only, valid until the block moves; BF16 as uint16 bits."""
        key = term.source, term.name
        if key not in self._stored:
            stored = self.sources[term.source].read(term.name, self.start, self.stop)
            self._stored[key] = np.ascontiguousarray(stored)
        return self._stored[key]

    def wide(self, term: Term, kind: Accumulator) -> np.ndarray:
        """The elements of a term, widened exactly to the accumulation type. Callers must not write to the array."""
        key = term.source, term.name, kind
        if key not in self._wide:
            self._wide[key] = self._widen(term, self.array(f"wide {len(self._wide)}", kind))
        return self._wide[key]

    def scaled(self, term: Term, factor: np.floating, use: str) -> np.ndarray:
        """`factor * x`, each product rounded, in the array named `use`."""
        out = self.array(use, factor.dtype)
        return np.multiply(self._operand(term, out), factor, out=out)

    def difference(self, term: Term, base: Term, out: np.ndarray) -> np.ndarray:
        """Write x - base, each difference rounded to the type of `out`, to `out`; return `out`."""
        return np.subtract(self._operand(term, out), self.wide(base, out.dtype.type), out=out)

    def array(self, use: str, dtype: type | np.dtype | str) -> np.ndarray:
        """An uninitialised array of the block's length; the same `use` and dtype return the same memory."""
        return self.scratch.take(use, dtype, len(self))

    def _operand(self, term: Term, out: np.ndarray) -> np.ndarray:
        """The widened tensor: from the cache if several plans share it, else written to `out`."""
        return self.wide(term, out.dtype.type) if self.plans > 1 else self._widen(term, out)

    def _widen(self, term: Term, out: np.ndarray) -> np.ndarray:
        dtype = self.sources[term.source].info(term.name)[0]
        return widen_into(out, self.stored(term), dtype, self.scratch)


class Workers:
    """Threads, each with its own Block. They run in parallel because numpy, hashing and file I/O release the GIL.

    Results depend neither on the number of threads nor on the order in which they finish.

    plans: number of plans that share the inputs.
    block: elements per block.
    ahead: number of items per thread that `map` submits before it waits for a result.
    """

    def __init__(
        self,
        sources: Sequence[WeightSource],
        plans: int = 1,
        threads: int | None = None,
        block: int = ELEMENTS_PER_BLOCK,
        ahead: int = 2,
    ) -> None:
        self.sources, self.block = sources, block
        self._threads = threads or min(4, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge")
        self._thread_local = threading.local()
        self._cache: dict[Any, Any] = {}
        self._plans, self._ahead = plans, ahead * self._threads

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def blocks(self, start: int, stop: int, length: int | None = None) -> Iterator[Block]:
        """This thread's Block, moved over [start, stop) in steps of `length` elements (default: `block`)."""
        block = self._thread_local.__dict__.get("block")
        if block is None:
            block = self._thread_local.block = Block(self.sources, self._plans)
        step = length or self.block
        for at in range(start, stop, step):
            yield block.move(at, min(at + step, stop))

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """work(item) per item, in the order of `items`; consumes only a few items ahead, so `items` may be long."""
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self._pool.submit(self._without_warnings, work, item))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def map_spans(self, work: Callable[[int, int], Result], count: int) -> Iterator[Result]:
        """work(start, stop) per span of `count` elements, in order."""
        return self.map(lambda span: work(*span), spans(count))

    def cached(self, key: Any, compute: Callable[[], Result]) -> Result:
        """compute(), or its earlier result for the same key: all plans of a sweep share one pass over a tensor."""
        if key not in self._cache:
            self._cache[key] = self._without_warnings(lambda _: compute(), None)
        return self._cache[key]

    def clear_cache(self) -> None:
        """Drop the results of `cached`."""
        self._cache.clear()

    @staticmethod
    def _without_warnings(work: Callable[[Any], Result], item: Any) -> Result:
        with np.errstate(all="ignore"):  # infinities and NaN in weights are data, not errors
            return work(item)


def spans(count: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [start, stop) of at most ELEMENTS_PER_SPAN elements that cover `count` elements."""
    for start in range(0, count, ELEMENTS_PER_SPAN):
        yield start, min(start + ELEMENTS_PER_SPAN, count)

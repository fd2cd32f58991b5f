"""One range of elements of the tensors that a job combines: read once, widened once, for every plan that wants it."""

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
    """Elements [start, stop) of every tensor a job needs. A thread has one and moves it on.

    `plans`: how many plans use what is widened; for one alone nothing is kept.
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
        self.start, self.stop = start, stop
        self._stored.clear()
        self._wide.clear()
        return self

    def stored(self, term: Term) -> np.ndarray:
        """As it is stored, read-only; BF16 as its bits, uint16."""
        key = term.source, term.name
        if key not in self._stored:
            self._stored[key] = self.sources[term.source].read(term.name, self.start, self.stop)
        return self._stored[key]

    def wide(self, term: Term, kind: Accumulator) -> np.ndarray:
        """Exactly, in the accumulation type; not to be written to."""
        key = term.source, term.name, kind
        if key not in self._wide:
            self._wide[key] = self._widen(term, self.array(f"wide {len(self._wide)}", kind))
        return self._wide[key]

    def scaled(self, term: Term, factor: np.floating, use: str) -> np.ndarray:
        """factor * x, each product rounded, in the array `use`."""
        out = self.array(use, factor.dtype)
        return np.multiply(self._operand(term, out), factor, out=out)

    def difference(self, term: Term, base: Term, out: np.ndarray) -> np.ndarray:
        """x - base, each rounded, in the type of `out`; returns it."""
        return np.subtract(self._operand(term, out), self.wide(base, out.dtype.type), out=out)

    def array(self, use: str, dtype: type | np.dtype | str) -> np.ndarray:
        """Memory of the block's length, the same for the same `use` and dtype."""
        return self.scratch.take(use, dtype, len(self))

    def _operand(self, term: Term, out: np.ndarray) -> np.ndarray:
        """The widened tensor: kept where other plans want it too, else in the memory that the result goes to."""
        return self.wide(term, out.dtype.type) if self.plans > 1 else self._widen(term, out)

    def _widen(self, term: Term, out: np.ndarray) -> np.ndarray:
        dtype = self.sources[term.source].info(term.name)[0]
        return widen_into(out, self.stored(term), dtype, self.scratch)


class Workers:
    """Threads that each have a Block. numpy, hashing and files let go of the interpreter: they run side by side.

    What `over` computes depends neither on their number nor on who is first.
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
        self._own = threading.local()
        self._found: dict[Any, Any] = {}
        self._plans, self._ahead = plans, ahead * self._threads

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def blocks(self, start: int, stop: int, length: int | None = None) -> Iterator[Block]:
        """This thread's Block, moved over [start, stop) by `length` elements at a time."""
        own = self._own.__dict__.get("block")
        if own is None:
            own = self._own.block = Block(self.sources, self._plans)
        step = length or self.block
        for at in range(start, stop, step):
            yield own.move(at, min(at + step, stop))

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of `items`, of which a few are taken ahead: their list may be long."""
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self._pool.submit(self._quietly, work, item))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def over(self, work: Callable[[int, int], Result], count: int) -> Iterator[Result]:
        """work(start, stop) over the spans that tile `count` elements; results in their order."""
        return self.each(lambda span: work(*span), spans(count))

    def once(self, key: Any, find: Callable[[], Result]) -> Result:
        """find(), or what it found for the same key since `forget`: plans of one sweep look at a tensor once."""
        if key not in self._found:
            self._found[key] = self._quietly(lambda _: find(), None)
        return self._found[key]

    def forget(self) -> None:
        self._found.clear()

    @staticmethod
    def _quietly(work: Callable[[Any], Result], item: Any) -> Result:
        with np.errstate(all="ignore"):  # infinities and NaN are data here
            return work(item)


def spans(count: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ELEMENTS_PER_SPAN elements that tile `count`."""
    for start in range(0, count, ELEMENTS_PER_SPAN):
        yield start, min(start + ELEMENTS_PER_SPAN, count)

"""A function over many files in several processes, which end when their parent does, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

Result = TypeVar("Result")
# Less than this is done before a process has started.
WORTH_A_PROCESS = 512 << 20


def walk_all(
    call: Callable[..., Result], todo: Sequence[tuple[str, str, int, str]], jobs: int
) -> Iterator[Result]:
    """call(url, path, bytes, version) of each, as they finish, in up to `jobs` processes."""
    total = sum(size for _, _, size, _ in todo)
    jobs = min(jobs, len(todo), total // WORTH_A_PROCESS)
    if jobs <= 1:
        for one in todo:
            yield call(*one)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool:
        waiting: set[Future[Result]] = set()
        left = iter(todo)
        try:
            while True:
                for one in left:
                    waiting.add(pool.submit(call, *one))
                    if len(waiting) >= 4 * jobs:
                        break
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def watch(parent: Any) -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()

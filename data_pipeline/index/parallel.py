"""Maps a function over many shards in spawned processes that die with their parent."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

from data_pipeline.child_process import exit_with_multiprocessing_parent, job_signals_blocked

Result = TypeVar("Result")
# This many bytes are scanned in the time that a process needs to start.
MIN_BYTES_PER_PROCESS = 512 << 20


def map_shards(
    function: Callable[..., Result], shards: Sequence[tuple[str, str, int, str]], jobs: int
) -> Iterator[Result]:
    """Yield function(url, path, bytes, version) for each shard, as the calls finish, in up to `jobs` processes."""
    total = sum(size for _, _, size, _ in shards)
    jobs = min(jobs, len(shards), total // MIN_BYTES_PER_PROCESS)
    if jobs <= 1:
        for shard in shards:
            yield function(*shard)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=exit_with_multiprocessing_parent) as pool:
        waiting: set[Future[Result]] = set()
        remaining = iter(shards)
        try:
            while True:
                for shard in remaining:
                    with job_signals_blocked():  # the first call starts the processes
                        waiting.add(pool.submit(function, *shard))
                    if len(waiting) >= 4 * jobs:
                        break
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException:  # also Ctrl-C: do not wait for scans that may take minutes
            for process in list((pool._processes or {}).values()):  # kill_workers() from Python 3.14 on
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

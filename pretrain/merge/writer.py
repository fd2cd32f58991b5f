"""Carries out plans: chunks read from mapped files, combined, written in place with pwrite; folders appear complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from pretrain.merge.methods import accumulator, combine, widen
from pretrain.merge.plan import Plan
from pretrain.merge.safetensors_io import DTYPES, SafetensorsFile, elements
from pretrain.merge.sources import WeightSource

CHUNK = 1 << 16  # elements: a chunk and its temporaries stay in the second-level cache
Progress = Callable[[int], None]


def write_tensors(
    plans: Sequence[Plan],
    sources: Sequence[WeightSource],
    folders: Sequence[Path],
    chunk: int = CHUNK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write each plan's files into its folder; plans that differ in their weights alone share every read.

    The bytes depend neither on `chunk` (elements) nor on `threads`. `progress` is told the bytes written.
    """
    files: list[list[int]] = []
    try:
        for plan, folder in zip(plans, folders, strict=True):
            files.append([])
            for file in plan.files:
                opened = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                files[-1].append(opened)
                _reserve(opened, file.size)
                _write(opened, file.header, 0)

        def work(item: tuple[int, int, int]) -> None:
            written = _chunk(plans, sources, files, *item)
            if progress is not None:
                progress(written)

        _spread(work, _chunks(plans[0], chunk), threads or min(4, os.cpu_count() or 1))
        for opened in chain.from_iterable(files):
            os.fsync(opened)
    finally:
        for opened in chain.from_iterable(files):
            os.close(opened)


def _spread(work: Callable[[Any], None], items: Iterator[Any], threads: int) -> None:
    """Call `work` on every item from several threads, a few ahead at a time: the list of chunks may be long."""
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[None]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(plan: Plan, chunk: int) -> Iterator[tuple[int, int, int]]:
    for number, job in enumerate(plan.jobs):
        count = elements(job.shape)
        for start in range(0, count, chunk):
            yield number, start, min(start + chunk, count)


def _chunk(
    plans: Sequence[Plan],
    sources: Sequence[WeightSource],
    files: Sequence[Sequence[int]],
    number: int,
    start: int,
    stop: int,
) -> int:
    """One range of one tensor, for every plan."""
    wide: dict[tuple[int, type], np.ndarray] = {}
    written = 0
    for plan, file in zip(plans, files, strict=True):
        job = plan.jobs[number]
        data = combine_range(plan, sources, number, start, stop, wide)
        _write(file[job.file], data.view(np.uint8).data, job.offset + start * data.itemsize)
        written += data.nbytes
    return written


def combine_range(
    plan: Plan,
    sources: Sequence[WeightSource],
    number: int,
    start: int,
    stop: int,
    wide: dict[tuple[int, type], np.ndarray] | None = None,
) -> np.ndarray:
    """Elements [start, stop) of a plan's tensor, as they are stored; `wide` keeps widened chunks between plans."""
    job = plan.jobs[number]
    if job.copy:
        return sources[job.terms[0].source].read(job.terms[0].name, start, stop)
    if job.method != "linear":
        raise UserError(f"--method {job.method} cannot be computed yet")
    wide = {} if wide is None else wide
    dtypes = [sources[term.source].info(term.name)[0] for term in job.terms]
    kind = accumulator(dtypes)
    for term, dtype in zip(job.terms, dtypes, strict=True):
        if (term.source, kind) not in wide:
            wide[term.source, kind] = widen(sources[term.source].read(term.name, start, stop), dtype, kind)
    chunks = [wide[term.source, kind] for term in job.terms]
    return combine(chunks, [term.weight for term in job.terms], kind, job.dtype)


def _reserve(file: int, size: int) -> None:
    """Take the space at once, so that a full disk is found before the work and not at its end."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(file, size)


def _write(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


def digests(path: Path) -> tuple[dict[str, str | int], dict[str, str]]:
    """Size and xxh64 of an output file, and xxh64 of each tensor in it."""
    output = SafetensorsFile(path)
    whole = xxhash.xxh64(output.header)
    tensors = {}
    for name in output.names():  # in the order of the file, so that header and tensors are all of it
        dtype, shape = output.info(name)
        one = xxhash.xxh64()
        step = (1 << 22) // DTYPES[dtype].itemsize
        for start in range(0, elements(shape), step):
            block = output.read(name, start, min(start + step, elements(shape))).view(np.uint8).data
            whole.update(block)
            one.update(block)
        tensors[name] = one.hexdigest()
    return {"size": output.size, "xxh64": whole.hexdigest()}, tensors


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is whole: a name beside it that nobody else gives a file."""
    return target.with_name(f".{target.name}.dromos-partial")


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends well, and vanishes when it does not.

    Raises UserError when someone else is writing it, when `needed` bytes are not free, or when the disk refuses.
    """
    partial = partial_of(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial).free
        with open(partial / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{out}: another process is writing it (it holds {partial}/.lock)") from None
            try:
                for left in partial.iterdir():
                    if left.is_dir():
                        shutil.rmtree(left)
                    elif left.name != ".lock":
                        free += left.stat().st_size
                        left.unlink()
                if needed > free:
                    raise UserError(f"{out}: needs {needed:,} bytes, {free:,} are free on that disk")
                yield partial
                (partial / ".lock").unlink()
                os.rename(partial, out)
                _sync(out.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system cannot. Whole or not at all."""
    partial = partial_of(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, target)


__all__ = ["CHUNK", "combine_range", "digests", "link_or_copy", "new_folder", "write_tensors"]

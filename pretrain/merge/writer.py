"""Carries out plans: spans of tensors read, combined, rounded and written in place, by threads, in any order."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from pretrain.merge import digests
from pretrain.merge.blocks import Block, Workers, spans
from pretrain.merge.journal import Done, Journal
from pretrain.merge.kernels import BLOCK, SPAN, narrow_into
from pretrain.merge.methods import Compute, prepare
from pretrain.merge.plan import Plan, TensorJob, Term
from pretrain.merge.safetensors_io import DTYPES, elements
from pretrain.merge.sources import WeightSource

Progress = Callable[[int], None]


@dataclass
class Output:
    """One plan's files in a folder, and what of them is written."""

    plan: Plan
    folder: Path
    journal: Journal
    files: list[int] = field(default_factory=list)

    def open(self, stack: ExitStack) -> None:
        """Open every file, with its header and all the room it needs: a full disk is found before the work."""
        for file in self.plan.files:
            opened = os.open(self.folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, opened)
            self.files.append(opened)
            if os.fstat(opened).st_size != file.size:
                reserve(opened, file.size)
            write_at(opened, file.header, 0)

    def digest(self, number: int, span: tuple[int, int]) -> str:
        """Of what now stands in the file for a span of a job."""
        job = self.plan.jobs[number]
        size = DTYPES[job.dtype].itemsize
        at, end = (job.offset + place * size for place in span)
        digest = xxhash.xxh64()
        while at < end and (data := os.pread(self.files[job.file], min(end - at, 1 << 20), at)):
            digest.update(data)
            at += len(data)
        return digest.hexdigest()

    def written(self) -> Written:
        """The digests of a complete output, put together from those of its spans."""
        tensors: dict[str, str] = {}
        inputs: list[dict[str, str]] = [{} for _ in self.plan.addresses]
        for number, job in enumerate(self.plan.jobs):
            parts = [
                self.journal.done[number, place] for place in range(len(list(spans(elements(job.shape)))))
            ]
            tensors[job.name] = digests.of_tensor(bytes.fromhex(part.digest) for part in parts)
            for place, term in enumerate(job.reads):
                read = digests.of_tensor(bytes.fromhex(part.inputs[place]) for part in parts)
                inputs[term.source][term.name] = read
        files = {
            file.name: digests.of_file(
                file.header, [tensors[j.name] for j in self.plan.jobs if j.file == number]
            )
            for number, file in enumerate(self.plan.files)
        }
        return Written(tensors, files, inputs)


@dataclass(frozen=True)
class Written:
    """Digests (pretrain.merge.digests) of an output.

    tensors, files: by name. inputs: of every source, by name, the tensors that were read.
    """

    tensors: dict[str, str]
    files: dict[str, str]
    inputs: list[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """One span of one job, for those outputs that have not got it."""

    number: int
    place: int
    span: tuple[int, int]
    todo: tuple[tuple[Output, Compute | None], ...]


def write_tensors(
    outputs: Sequence[Output],
    sources: Sequence[WeightSource],
    block: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write what is missing of every output; plans that differ in their weights alone share every read.

    The bytes depend neither on `block` (elements) nor on `threads`. `progress` is told the bytes that are done.
    """
    told = progress or (lambda _: None)
    with ExitStack() as stack, Workers(sources, len(outputs), threads, block) as workers:
        for output in outputs:
            output.open(stack)
            told(sum(len(file.header) for file in output.plan.files) + _keep_what_is_there(output, workers))
        for task, made in workers.each(
            lambda task: (task, _carry_out(task, workers)), _tasks(outputs, workers)
        ):
            for (output, _), done in zip(task.todo, made, strict=True):
                output.journal.add(task.number, task.place, done)
                told((task.span[1] - task.span[0]) * DTYPES[output.plan.jobs[task.number].dtype].itemsize)


def _keep_what_is_there(output: Output, workers: Workers) -> int:
    """Forget journalled spans that do not stand in the file as they were written; bytes of the others."""
    done = output.journal.done
    kept = 0

    def check(key: tuple[int, int]) -> tuple[tuple[int, int], int]:
        job = output.plan.jobs[key[0]]
        span = key[1] * SPAN, min((key[1] + 1) * SPAN, elements(job.shape))
        same = output.digest(key[0], span) == done[key].digest
        return key, (span[1] - span[0]) * DTYPES[job.dtype].itemsize if same else -1

    for key, size in list(workers.each(check, list(done))):
        if size < 0:
            del done[key]
        kept += max(size, 0)
    return kept


def _tasks(outputs: Sequence[Output], workers: Workers) -> Iterator[Task]:
    """In the order of the files. A method that looks at a whole tensor first does so when its turn comes."""
    for number, job in enumerate(outputs[0].plan.jobs):
        places = list(enumerate(spans(elements(job.shape))))
        todo = [o for o in outputs if any((number, place) not in o.journal.done for place, _ in places)]
        workers.forget()
        ready = {id(o): None if (j := o.plan.jobs[number]).copy else prepare(j, workers) for o in todo}
        for place, span in places:
            missing = tuple((o, ready[id(o)]) for o in todo if (number, place) not in o.journal.done)
            if missing:
                yield Task(number, place, span, missing)


def _carry_out(task: Task, workers: Workers) -> list[Done]:
    """Read, combine, round, write; the digests on the way, while the bytes are in the cache."""
    jobs = [output.plan.jobs[task.number] for output, _ in task.todo]
    made = [xxhash.xxh64() for _ in jobs]
    read = {term_key(term): xxhash.xxh64() for job in jobs for term in job.reads}
    terms = {term_key(term): term for job in jobs for term in job.reads}
    for block in workers.blocks(*task.span):
        for key, digest in read.items():
            digest.update(block.stored(terms[key]).view(np.uint8).data)
        for (output, compute), job, digest in zip(task.todo, jobs, made, strict=True):
            stored = rounded(block, job, compute).view(np.uint8).data
            digest.update(stored)
            write_at(output.files[job.file], stored, job.offset + block.start * DTYPES[job.dtype].itemsize)
    return [
        Done(digest.hexdigest(), tuple(read[term_key(term)].hexdigest() for term in job.reads))
        for job, digest in zip(jobs, made, strict=True)
    ]


def term_key(term: Term) -> tuple[int, str]:
    """Terms with the same key read the same tensor, whatever their weights."""
    return term.source, term.name


def rounded(block: Block, job: TensorJob, compute: Compute | None) -> np.ndarray:
    """The block's elements of the output as they are stored; read-only, and gone with the next block."""
    if compute is None:
        return block.stored(job.terms[0])
    stored = block.array("stored", DTYPES[job.dtype])
    narrow_into(stored, compute(block), job.dtype, block.scratch)
    return stored


def combine_range(
    plan: Plan, sources: Sequence[WeightSource], number: int, start: int, stop: int
) -> np.ndarray:
    """Elements [start, stop) of a plan's tensor, as they are stored; nothing is written."""
    job = plan.jobs[number]
    found = np.empty(stop - start, DTYPES[job.dtype])
    with Workers(sources) as workers, np.errstate(all="ignore"):
        compute = None if job.copy else prepare(job, workers)
        for block in workers.blocks(start, stop):
            found[block.start - start : block.stop - start] = rounded(block, job, compute)
    return found


def reserve(file: int, size: int) -> None:
    """Take the space at once, so that a full disk is found before the work and not at its end."""
    os.ftruncate(file, size)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def write_at(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done

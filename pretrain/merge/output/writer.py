"""Carries out plans: spans of tensors read, combined, rounded and handed to outputs, by threads, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from pretrain.merge.merge_plan import Plan, TensorJob, Term
from pretrain.merge.methods import native
from pretrain.merge.methods.blocks import Block, Workers, spans
from pretrain.merge.methods.compute import Compute, prepare
from pretrain.merge.output import overflow
from pretrain.merge.output.journal import Done
from pretrain.weights import digests
from pretrain.weights.dtypes import DTYPES, ELEMENTS_PER_BLOCK, elements, narrow_into
from pretrain.weights.source import WeightSource

MANY = 4  # outputs in order of which several spans may be held

Progress = Callable[[int], None]
Key = tuple[int, int]
"""numbers of a job and of a span of it"""


class Output(Protocol):
    """Where one plan's files go.

    in_order: whether it takes the spans' bytes one after the other, or has every block put in its place at once.
    done:     the spans that need not be written, with their digests.
    open:     before all else; bytes that are there already.
    put:      a block's bytes from an element of a job on; called by several threads.
    take:     a finished span, in order; with its bytes where these are wanted in order.
    finish:   after the last span.
    """

    plan: Plan
    in_order: bool

    @property
    def done(self) -> dict[Key, Done]: ...

    def open(self, stack: ExitStack, workers: Workers) -> int: ...

    def put(self, job: TensorJob, start: int, stored: memoryview) -> None: ...

    def take(self, key: Key, done: Done, stored: bytes | bytearray) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Written:
    """Digests (pretrain.weights.digests) of an output.

    tensors, files: by name. inputs: of every source, by name, the tensors that were read.
    overflow: tensors with elements that are not finite though all inputs are, and how many.
    """

    tensors: dict[str, str]
    files: dict[str, str]
    inputs: list[dict[str, str]]
    overflow: dict[str, int]


def written(output: Output) -> Written:
    """The digests of a complete output, put together from those of its spans."""
    plan = output.plan
    tensors: dict[str, str] = {}
    inputs: list[dict[str, str]] = [{} for _ in plan.addresses]
    overflows: dict[str, int] = {}
    for number, job in enumerate(plan.jobs):
        parts = [output.done[number, place] for place in range(len(list(spans(elements(job.shape)))))]
        tensors[job.name] = digests.tensor_digest(bytes.fromhex(part.digest) for part in parts)
        if count := sum(part.overflow for part in parts):
            overflows[job.name] = count
        for place, term in enumerate(job.reads):
            read = digests.tensor_digest(bytes.fromhex(part.inputs[place]) for part in parts)
            inputs[term.source][term.name] = read
    files = {
        file.name: digests.file_digest(file.header, [tensors[j.name] for j in plan.jobs if j.file == number])
        for number, file in enumerate(plan.files)
    }
    return Written(tensors, files, inputs, overflows)


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
    block: int = ELEMENTS_PER_BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write what is missing of every output; plans that differ in their weights alone share every read.

    The bytes depend neither on `block` (elements) nor on `threads`. `progress` is told the bytes that are done.
    """
    told = progress or (lambda _: None)
    in_order = sum(output.in_order for output in outputs)  # of each, spans that are ahead are held whole
    ahead = 2 if not in_order else 1 if in_order <= MANY else 0
    with ExitStack() as stack, Workers(sources, len(outputs), threads, block, ahead) as workers:
        for output in outputs:
            told(output.open(stack, workers))
        for task, made in workers.each(lambda t: (t, _carry_out(t, workers)), _tasks(outputs, workers)):
            for (output, _), (done, stored) in zip(task.todo, made, strict=True):
                output.take((task.number, task.place), done, stored)
                told((task.span[1] - task.span[0]) * DTYPES[output.plan.jobs[task.number].dtype].itemsize)
        for output in outputs:
            output.finish()


def _tasks(outputs: Sequence[Output], workers: Workers) -> Iterator[Task]:
    """In the order of the files. A method that looks at a whole tensor first does so when its turn comes."""
    for number, job in enumerate(outputs[0].plan.jobs):
        places = list(enumerate(spans(elements(job.shape))))
        todo = [o for o in outputs if any((number, place) not in o.done for place, _ in places)]
        workers.forget()
        ready = {id(o): None if (j := o.plan.jobs[number]).copy else prepare(j, workers) for o in todo}
        for place, span in places:
            missing = tuple((o, ready[id(o)]) for o in todo if (number, place) not in o.done)
            if missing:
                yield Task(number, place, span, missing)


def _carry_out(task: Task, workers: Workers) -> list[tuple[Done, bytearray]]:
    """Read, combine, round, put; the digests on the way, while the bytes are in the cache."""
    jobs = [output.plan.jobs[task.number] for output, _ in task.todo]
    made = [(xxhash.xxh64(), bytearray()) for _ in jobs]
    overflows = [0] * len(jobs)
    read = {term_key(term): (term, xxhash.xxh64()) for job in jobs for term in job.reads}
    one_pass = all(compute is None or compute.fused for _, compute in task.todo)
    for block in workers.blocks(*task.span, workers.block * (native.WIDER if one_pass else 1)):
        for term, digest in read.values():
            digest.update(block.stored(term).view(np.uint8).data)
        for number, (output, compute) in enumerate(task.todo):
            array, count = combined(block, jobs[number], compute)
            stored = array.view(np.uint8).data
            overflows[number] += count
            made[number][0].update(stored)
            if output.in_order:
                made[number][1].extend(stored)
            else:
                output.put(jobs[number], block.start, stored)
    return [
        (
            Done(digest.hexdigest(), tuple(read[term_key(term)][1].hexdigest() for term in job.reads), count),
            kept,
        )
        for job, (digest, kept), count in zip(jobs, made, overflows, strict=True)
    ]


def term_key(term: Term) -> tuple[int, str]:
    """Terms with the same key read the same tensor, whatever their weights."""
    return term.source, term.name


def combined(block: Block, job: TensorJob, compute: Compute | None) -> tuple[np.ndarray, int]:
    """The block's elements of the output as they are stored, read-only, and gone with the next block; how many of
    them are not finite though all inputs are."""
    if compute is None:
        return block.stored(job.terms[0]), 0
    stored = block.array("stored", DTYPES[job.dtype])
    if compute.fused is None:
        narrow_into(stored, compute.total(block), job.dtype, block.scratch)
        return stored, overflow.born(block, job, stored)
    return stored, overflow.born(block, job, stored) if compute.fused(block, stored) else 0


def rounded(block: Block, job: TensorJob, compute: Compute | None) -> np.ndarray:
    """The block's elements of the output as they are stored; read-only, and gone with the next block."""
    return combined(block, job, compute)[0]


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

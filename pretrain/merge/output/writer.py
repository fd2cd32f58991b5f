"""Executes plans: threads read, combine and round spans of tensors and pass them to `Output` objects."""

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
from pretrain.merge.output.journal import SpanRecord
from pretrain.weights import digests
from pretrain.weights.dtypes import DTYPES, ELEMENTS_PER_BLOCK, elements, narrow_into
from pretrain.weights.source import WeightSource

MAX_BUFFERED_OUTPUTS = 4  # with more sequential outputs, no span is computed ahead, to bound memory

Progress = Callable[[int], None]  # called with the number of output bytes that were just completed
SpanKey = tuple[int, int]  # index of a job in the plan, index of a span in its tensor


class Output(Protocol):
    """Destination of one plan's files: `LocalOutput` (a folder) or `RemoteOutput` (an object store).

    sequential:  True if it needs the bytes of the spans in order; False if blocks are written at any offset.
    done:        the finished spans, with their digests; they are not written again.
    open:        called first; returns the number of bytes that are already written.
    write_block: writes a block's bytes, starting at element `start` of a job; called by several threads.
    finish_span: called per finished span, in order; `stored` has its bytes if the output is sequential.
    finish:      called after the last span.
    """

    plan: Plan
    sequential: bool

    @property
    def done(self) -> dict[SpanKey, SpanRecord]: ...

    def open(self, stack: ExitStack, workers: Workers) -> int: ...

    def write_block(self, job: TensorJob, start: int, stored: memoryview) -> None: ...

    def finish_span(self, key: SpanKey, record: SpanRecord, stored: bytes | bytearray) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class OutputDigests:
    """Digests (pretrain.weights.digests) of an output.

    tensors:  tensor name -> digest.
    files:    file name -> digest.
    inputs:   per source, tensor name -> digest of the tensors that were read.
    overflow: tensor name -> number of elements that are infinite or NaN although all inputs are finite.
    """

    tensors: dict[str, str]
    files: dict[str, str]
    inputs: list[dict[str, str]]
    overflow: dict[str, int]


def output_digests(output: Output) -> OutputDigests:
    """The digests of a complete output, combined from the digests of its spans."""
    plan = output.plan
    tensors: dict[str, str] = {}
    inputs: list[dict[str, str]] = [{} for _ in plan.addresses]
    overflows: dict[str, int] = {}
    for number, job in enumerate(plan.jobs):
        records = [output.done[number, span] for span in range(len(list(spans(elements(job.shape)))))]
        tensors[job.name] = digests.tensor_digest(bytes.fromhex(record.digest) for record in records)
        if count := sum(record.overflow for record in records):
            overflows[job.name] = count
        for i, term in enumerate(job.reads):
            read = digests.tensor_digest(bytes.fromhex(record.inputs[i]) for record in records)
            inputs[term.source][term.name] = read
    files = {
        file.name: digests.file_digest(file.header, [tensors[j.name] for j in plan.jobs if j.file == number])
        for number, file in enumerate(plan.files)
    }
    return OutputDigests(tensors, files, inputs, overflows)


@dataclass(frozen=True)
class SpanTask:
    """One span of one job, for the outputs that do not have it yet.

    key:     indices of the job and the span.
    span:    elements [start, stop) of the tensor.
    outputs: the outputs to write, each with its method; None copies the stored elements.
    """

    key: SpanKey
    span: tuple[int, int]
    outputs: tuple[tuple[Output, Compute | None], ...]


def write_tensors(
    outputs: Sequence[Output],
    sources: Sequence[WeightSource],
    block: int = ELEMENTS_PER_BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the missing spans of every output. The plans differ only in their weights, so they share every read.

    The bytes depend neither on `block` (elements) nor on `threads`.
    """
    report = progress or (lambda _: None)
    # Sequential outputs keep every span that is computed ahead in memory.
    sequential = sum(output.sequential for output in outputs)
    ahead = 2 if not sequential else 1 if sequential <= MAX_BUFFERED_OUTPUTS else 0
    with ExitStack() as stack, Workers(sources, len(outputs), threads, block, ahead) as workers:
        for output in outputs:
            report(output.open(stack, workers))
        for task, results in workers.map(lambda t: (t, _compute_span(t, workers)), _tasks(outputs, workers)):
            for (output, _), (record, stored) in zip(task.outputs, results, strict=True):
                output.finish_span(task.key, record, stored)
                report((task.span[1] - task.span[0]) * DTYPES[output.plan.jobs[task.key[0]].dtype].itemsize)
        for output in outputs:
            output.finish()


def _tasks(outputs: Sequence[Output], workers: Workers) -> Iterator[SpanTask]:
    """Tasks in file order. A method that needs passes over the whole tensor runs them just before its first task."""
    for number, job in enumerate(outputs[0].plan.jobs):
        numbered = list(enumerate(spans(elements(job.shape))))
        unfinished = [o for o in outputs if any((number, i) not in o.done for i, _ in numbered)]
        workers.clear_cache()
        computes = {
            id(o): None if (j := o.plan.jobs[number]).copy else prepare(j, workers) for o in unfinished
        }
        for i, span in numbered:
            missing = tuple((o, computes[id(o)]) for o in unfinished if (number, i) not in o.done)
            if missing:
                yield SpanTask((number, i), span, missing)


def _compute_span(task: SpanTask, workers: Workers) -> list[tuple[SpanRecord, bytearray]]:
    """Read, combine, round and write one span, per output. Bytes are hashed while they are in the CPU cache.

    Returns per output the span's record, and its bytes if the output is sequential (else none).
    """
    jobs = [output.plan.jobs[task.key[0]] for output, _ in task.outputs]
    results = [(xxhash.xxh64(), bytearray()) for _ in jobs]
    overflows = [0] * len(jobs)
    read = {term_key(term): (term, xxhash.xxh64()) for job in jobs for term in job.reads}
    one_pass = all(compute is None or compute.fused for _, compute in task.outputs)
    for block in workers.blocks(*task.span, workers.block * (native.BLOCKS_PER_PASS if one_pass else 1)):
        for term, digest in read.values():
            digest.update(block.stored(term).view(np.uint8).data)
        for number, (output, compute) in enumerate(task.outputs):
            array, count = combine_block(block, jobs[number], compute)
            stored = array.view(np.uint8).data
            overflows[number] += count
            results[number][0].update(stored)
            if output.sequential:
                results[number][1].extend(stored)
            else:
                output.write_block(jobs[number], block.start, stored)
    return [
        (
            SpanRecord(
                digest.hexdigest(), tuple(read[term_key(term)][1].hexdigest() for term in job.reads), count
            ),
            stored_bytes,
        )
        for job, (digest, stored_bytes), count in zip(jobs, results, overflows, strict=True)
    ]


def term_key(term: Term) -> tuple[int, str]:
    """Equal for terms that read the same tensor, whatever their weights."""
    return term.source, term.name


def combine_block(block: Block, job: TensorJob, compute: Compute | None) -> tuple[np.ndarray, int]:
    """The block's elements of the output in stored form, and the number that became infinite or NaN.

    The array is read-only and only valid until the block moves. `compute`: None copies the only term.
    """
    if compute is None:
        return block.stored(job.terms[0]), 0
    stored = block.array("stored", DTYPES[job.dtype])
    if compute.fused is None:
        narrow_into(stored, compute.total(block), job.dtype, block.scratch)
        return stored, overflow.count_overflows(block, job, stored)
    return stored, overflow.count_overflows(block, job, stored) if compute.fused(block, stored) else 0


def rounded(block: Block, job: TensorJob, compute: Compute | None) -> np.ndarray:
    """The block's elements of the output in stored form; read-only and only valid until the block moves."""
    return combine_block(block, job, compute)[0]


def combine_range(
    plan: Plan, sources: Sequence[WeightSource], number: int, start: int, stop: int
) -> np.ndarray:
    """Elements [start, stop) of the tensor of job `number`, in stored form; writes nothing."""
    job = plan.jobs[number]
    result = np.empty(stop - start, DTYPES[job.dtype])
    with Workers(sources) as workers, np.errstate(all="ignore"):
        compute = None if job.copy else prepare(job, workers)
        for block in workers.blocks(start, stop):
            result[block.start - start : block.stop - start] = rounded(block, job, compute)
    return result

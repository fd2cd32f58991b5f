"""Recomputes random chunks of an output from the inputs that merge.json names, and compares them bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.errors import ReadError, UserError
from pretrain.merge.merge_plan import TensorJob
from pretrain.merge.methods.blocks import Workers, spans
from pretrain.merge.methods.compute import Compute, prepare
from pretrain.merge.output.writer import rounded
from pretrain.weights.digests import combined_digest, tensor_digest
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, elements
from pretrain.weights.formats.safetensors_file import SafetensorsFile
from pretrain.weights.source import WeightSource, open_weights

UNCHANGED, CHANGED, GONE, UNREACHED = "unchanged", "changed", "gone", "not reached"
RELATIVE_PATH = " (its path is relative: run verify in the folder in which the merge ran)"
Progress = Callable[[int], None]
# Index of the job, elements [start, stop), and the computation (None for a copied tensor).
Chunk = tuple[int, int, int, Compute | None]


def open_inputs_of(record: Mapping[str, Any]) -> tuple[list[WeightSource | None], list[tuple[str, str]]]:
    """The inputs of a merge as sources, and per input its state and the reason for it.

    A state is UNCHANGED, CHANGED (reason: the changed files), GONE or UNREACHED (reason: the error). A source is None
    unless its input is unchanged. With a joint vocabulary all sources are None if one is: an embedding row of the
    output can come from any input.
    """
    sources: list[WeightSource | None] = []
    states: list[tuple[str, str]] = []
    for entry in record["inputs"]:
        try:
            source = open_weights(str(entry["path"]), key=entry.get("key"))
            now, then = source.hashes(), dict(entry["files"])
        except ReadError as error:  # the input stays unchecked; the output itself can still be checked
            sources.append(None)
            states.append((UNREACHED, str(error)))
            continue
        except UserError as error:
            sources.append(None)
            relative = (
                "" if "://" in (path := str(entry["path"])) or Path(path).is_absolute() else RELATIVE_PATH
            )
            states.append((GONE, f"{error}{relative}"))
            continue
        changed = sorted(name for name in {**now, **then} if now.get(name) != then.get(name))
        if not changed:
            source.rename(entry.get("renamed") or {})
        sources.append(source if not changed else None)
        states.append((CHANGED, ", ".join(changed)) if changed else (UNCHANGED, ""))
    request = record.get("asked") or {}
    spec = request.get("mergekit") or {}
    joint = request.get("vocabulary") or spec.get("tokenizer_source") or spec.get("tokenizer") is not None
    return _with_joint_vocabulary(sources, request) if joint else sources, states


def _with_joint_vocabulary(
    sources: list[WeightSource | None], request: dict[str, Any]
) -> list[WeightSource | None]:
    """The sources with the embedding rows of the joint vocabulary; all None if it cannot be rebuilt."""
    from pretrain.merge.spec import replan

    try:
        return [*replan(request)[1].sources] if None not in sources else [None] * len(sources)
    except (UserError, ReadError):  # for example relative addresses, if verify runs in another folder
        return [None] * len(sources)


def read_digest(number: int, source: WeightSource, jobs: Sequence[TensorJob], workers: Workers) -> str:
    """Digest of all tensors that the jobs read from source `number`, read again; merge.json records the same digest."""
    names = {term.name for job in jobs for term in job.reads if term.source == number}

    def digest(name: str) -> str:
        def work(start: int, stop: int) -> bytes:
            hasher = xxhash.xxh64()
            for at in range(start, stop, ELEMENTS_PER_BLOCK):
                hasher.update(source.read(name, at, min(at + ELEMENTS_PER_BLOCK, stop)).view(np.uint8).data)
            return hasher.digest()

        return tensor_digest(workers.map_spans(work, elements(source.info(name)[1])))

    return combined_digest({name: digest(name) for name in names})


def chunks(jobs: Sequence[TensorJob], count: int | None, seed: int) -> Iterator[tuple[int, int, int]]:
    """(index of the job, start, stop) of `count` random ranges of at most ELEMENTS_PER_BLOCK elements; None: all spans.

    A tensor is drawn with a probability proportional to its size.
    """
    if count is None:
        for number, job in enumerate(jobs):
            yield from ((number, *span) for span in spans(elements(job.shape)))
        return
    sizes = [elements(job.shape) for job in jobs]
    if not sum(sizes):
        return
    rng = random.Random(seed)
    for number in sorted(rng.choices(range(len(jobs)), weights=sizes, k=count)):
        start = rng.randrange(sizes[number])
        yield number, start, min(start + ELEMENTS_PER_BLOCK, sizes[number])


def differing(
    files: Mapping[str, SafetensorsFile],
    jobs: Sequence[tuple[str, TensorJob]],
    sources: Sequence[WeightSource | None],
    count: int | None,
    seed: int,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[int, list[str]]:
    """Recompute `count` random chunks (None: everything) and compare them with the bytes in `files`.

    jobs: (file name, job) of the output's tensors. Only jobs whose sources are all available are used.
    Returns the number of recomputed chunks, and a description of each one that differs.
    """
    usable = [
        (file, job) for file, job in jobs if all(sources[term.source] is not None for term in job.reads)
    ]
    differences: list[str] = []
    recomputed = 0
    opened: Any = sources  # has None for unavailable inputs, which no usable job reads
    with Workers(opened, threads=threads) as workers:
        prepared = _prepared(
            [job for _, job in usable], chunks([job for _, job in usable], count, seed), workers
        )

        def is_equal(chunk: Chunk) -> bool:
            number, start, stop, compute = chunk
            file, job = usable[number]
            return all(
                np.array_equal(
                    rounded(block, job, compute).view(np.uint8),
                    files[file].read(job.name, block.start, block.stop).view(np.uint8),
                )
                for block in workers.blocks(start, stop)
            )

        for (number, start, stop, _), equal in workers.map(lambda chunk: (chunk, is_equal(chunk)), prepared):
            job = usable[number][1]
            if not equal:
                differences.append(f"{job.name}, elements {start:,} to {stop:,}")
            recomputed += 1
            if progress is not None:
                progress((stop - start) * job.size // max(1, elements(job.shape)))
    return recomputed, differences


def _prepared(
    jobs: Sequence[TensorJob], ranges: Iterable[tuple[int, int, int]], workers: Workers
) -> Iterator[Chunk]:
    """Add the computation of its job to each range. A method's first pass over a tensor runs at its first range."""
    last, compute = -1, None
    for number, start, stop in ranges:
        if number != last:
            workers.clear_cache()
            last, compute = number, None if jobs[number].copy else prepare(jobs[number], workers)
        yield number, start, stop, compute

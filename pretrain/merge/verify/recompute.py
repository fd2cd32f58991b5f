"""Parts of a merge computed again from its inputs, from what merge.json says alone."""

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
RELATIVE = " (its path is relative: verify where the merge was made)"
Progress = Callable[[int], None]
Chunk = tuple[int, int, int, Compute | None]
"""number of a job, elements from and to, and how they are computed; None: copied"""


def open_inputs_of(record: Mapping[str, Any]) -> tuple[list[WeightSource | None], list[tuple[str, str]]]:
    """The sources of a merge where they were, None for those that are no longer as they were; with each its state
    (UNCHANGED, CHANGED, GONE, UNREACHED) and what that is known from. Of a joint vocabulary, rows of one are read in
    another's place: there all are None where one is."""
    sources: list[WeightSource | None] = []
    states: list[tuple[str, str]] = []
    for entry in record["inputs"]:
        try:
            source = open_weights(str(entry["path"]))
            now, then = source.hashes(), dict(entry["files"])
        except ReadError as error:  # what stands in the output can be checked all the same
            sources.append(None)
            states.append((UNREACHED, str(error)))
            continue
        except UserError as error:
            sources.append(None)
            relative = "" if "://" in (path := str(entry["path"])) or Path(path).is_absolute() else RELATIVE
            states.append((GONE, f"{error}{relative}"))
            continue
        other = sorted(name for name in {**now, **then} if now.get(name) != then.get(name))
        sources.append(source if not other else None)
        states.append((CHANGED, ", ".join(other)) if other else (UNCHANGED, ""))
    asked = record.get("asked") or {}
    file = asked.get("mergekit") or {}
    joint = asked.get("vocabulary") or file.get("tokenizer_source") or file.get("tokenizer") is not None
    return _rejoined(sources, asked) if joint else sources, states


def _rejoined(sources: list[WeightSource | None], asked: dict[str, Any]) -> list[WeightSource | None]:
    """The sources seen through the rows of the joint vocabulary."""
    from pretrain.merge.spec import replan

    try:
        return [*replan(asked)[1].sources] if None not in sources else [None] * len(sources)
    except (UserError, ReadError):  # what was asked for by another name, or from another folder
        return [None] * len(sources)


def read_digest(number: int, source: WeightSource, jobs: Sequence[TensorJob], workers: Workers) -> str:
    """The digest over all that the jobs read of source `number`, read again."""
    names = {term.name for job in jobs for term in job.reads if term.source == number}

    def digest(name: str) -> str:
        def work(start: int, stop: int) -> bytes:
            one = xxhash.xxh64()
            for at in range(start, stop, ELEMENTS_PER_BLOCK):
                one.update(source.read(name, at, min(at + ELEMENTS_PER_BLOCK, stop)).view(np.uint8).data)
            return one.digest()

        return tensor_digest(workers.over(work, elements(source.info(name)[1])))

    return combined_digest({name: digest(name) for name in names})


def chunks(jobs: Sequence[TensorJob], count: int | None, seed: int) -> Iterator[tuple[int, int, int]]:
    """(number of the job, start, stop): `count` ranges of at most BLOCK elements, drawn by size; None: everything."""
    if count is None:
        for number, job in enumerate(jobs):
            yield from ((number, *span) for span in spans(elements(job.shape)))
        return
    sizes = [elements(job.shape) for job in jobs]
    if not sum(sizes):
        return
    draw = random.Random(seed)
    for number in sorted(draw.choices(range(len(jobs)), weights=sizes, k=count)):
        start = draw.randrange(sizes[number])
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
    """How many chunks were computed again, and what of them is not what stands in `files`.

    jobs: (name of the file, job). Only jobs are drawn whose sources are all there.
    """
    usable = [
        (file, job) for file, job in jobs if all(sources[term.source] is not None for term in job.reads)
    ]
    wrong: list[str] = []
    done = 0
    opened: Any = sources
    with Workers(opened, threads=threads) as workers:
        drawn = _prepared(
            [job for _, job in usable], chunks([job for _, job in usable], count, seed), workers
        )

        def same(chunk: Chunk) -> bool:
            number, start, stop, compute = chunk
            file, job = usable[number]
            return all(
                np.array_equal(
                    rounded(block, job, compute).view(np.uint8),
                    files[file].read(job.name, block.start, block.stop).view(np.uint8),
                )
                for block in workers.blocks(start, stop)
            )

        for (number, start, stop, _), equal in workers.each(lambda chunk: (chunk, same(chunk)), drawn):
            job = usable[number][1]
            if not equal:
                wrong.append(f"{job.name}, elements {start:,} to {stop:,}")
            done += 1
            if progress is not None:
                progress((stop - start) * job.size // max(1, elements(job.shape)))
    return done, wrong


def _prepared(
    jobs: Sequence[TensorJob], drawn: Iterable[tuple[int, int, int]], workers: Workers
) -> Iterator[Chunk]:
    """Each chunk with how its job is computed; a method that looks at a whole tensor does so when its turn comes."""
    last, compute = -1, None
    for number, start, stop in drawn:
        if number != last:
            workers.forget()
            last, compute = number, None if jobs[number].copy else prepare(jobs[number], workers)
        yield number, start, stop, compute

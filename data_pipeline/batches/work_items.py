"""How a step is cut into work: rows to ranks, rows to micro-batches, and what a worker needs to make one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.order import digest
from data_pipeline.order.batch_schedule import uneven_batch
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.tokenizers import Tokenizer

# Rows below which it is not worth to cut: a row of images takes milliseconds, one of packed text microseconds.
LEAST_IMAGES = 8
LEAST_TEXT = 256
# Fields of a batch that its parts have in common, or that are said of the whole.
WHOLE = ("stream", "step", "start", "stop", "pixels", "meta")


@dataclass(frozen=True)
class WorkItem:
    """One unit of work: a micro-batch of one stream."""

    stream: str
    step: int
    start: int
    stop: int


@dataclass(frozen=True)
class BuilderSetup:
    """All that another process needs to make batches of a stream; no file but the shards."""

    spec: StreamSpec
    manifests: dict[str, Manifest]
    tokenizer: Tokenizer | None
    cache: CacheSettings | None = None

    @staticmethod
    def of(builder: BatchBuilder) -> BuilderSetup:
        return BuilderSetup(builder.spec, builder.manifests, builder.tokenizer, builder.cache)

    def builder(self) -> BatchBuilder:
        return BatchBuilder(self.spec, self.manifests, self.tokenizer, self.cache)


def rows_of(rank: int, world_size: int, batch: int) -> tuple[int, int]:
    """Rows [start, stop) of the global batch that a rank takes. Raises UserError if the ranks cannot share it."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    problem = uneven_batch(batch, world_size)
    if problem is not None:
        raise UserError(problem)
    rows = batch // world_size
    return rank * rows, (rank + 1) * rows


def micro_batches(start: int, stop: int, micro_batch: int | None) -> list[tuple[int, int]]:
    """Rows [start, stop) in pieces of `micro_batch` rows, the last perhaps smaller; None: one piece."""
    size = micro_batch or max(1, stop - start)
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def items_of(
    specs: Sequence[StreamSpec], step: int, rank: int, world_size: int, micro_batch: int | None
) -> Iterator[WorkItem]:
    """A rank's work of one step, in the order in which it is needed."""
    for spec in specs:
        for start, stop in micro_batches(*rows_of(rank, world_size, spec.rows(step)), micro_batch):
            yield WorkItem(spec.name, step, start, stop)


def check_ranks(specs: Sequence[StreamSpec], world_size: int) -> None:
    """Raise UserError that names the stream whose batch the ranks cannot share."""
    for spec in specs:
        for first, batch in zip(spec.batches.first, spec.batches.rows, strict=True):
            problem = uneven_batch(batch, world_size)
            if problem is not None:
                where = f" from step {first} on" if len(spec.batches.rows) > 1 else ""
                raise UserError(f"data.{spec.name}.batch{where}: {problem}")


def pixel_shape(spec: StreamSpec, rows: int) -> tuple[int, int, int, int]:
    """Of the pixels of so many rows; without bytes in a stream of text."""
    size = spec.image.size if spec.image is not None else 0
    return rows, size, size, 3


def split_item(item: WorkItem, spec: StreamSpec, pieces: int) -> list[WorkItem]:
    """At most so many items of nearly equal numbers of rows, in order."""
    rows = item.stop - item.start
    pieces = max(1, min(pieces, rows // (LEAST_TEXT if spec.packed else LEAST_IMAGES)))
    ends = [item.start + rows * i // pieces for i in range(pieces + 1)]
    return [replace(item, start=a, stop=b) for a, b in pairwise(ends)]


def join_batches(parts: Sequence[Batch]) -> Batch:
    """The batch of the parts' rows, which follow on one another: arrays end to end, counters and digests summed."""
    if len(parts) == 1:
        return parts[0]
    joined = {
        field.name: _together(field.name, [getattr(part, field.name) for part in parts])
        for field in fields(Batch)
    }
    return Batch(**joined | {"stop": parts[-1].stop})


def _together(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, list):
        return [each for value in values for each in value]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _together(key, [value[key] for value in values if key in value]) for key in keys}
    if name.endswith("digest"):
        return reduce(digest.add, values)
    # What remains inside a dictionary is a counter; what remains of the batch is the same in every part.
    return first if name in WHOLE else sum(values)

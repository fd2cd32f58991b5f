"""Work items: the rows of a rank, micro-batches, dummy rows, slices for workers, and joining slices again.

Also `BuilderSetup`, which lets another process build the same batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.order import digest
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.text_formats import PackedFormat
from data_pipeline.transforms.tokenizers import Tokenizer

# Smallest slice of a stream with images, in rows: smaller slices cost more than they save.
MIN_IMAGE_ROWS = 8
# Fields taken from the first slice, not summed. (Arrays and lists are concatenated.)
COMMON_FIELDS = ("stream", "step", "start", "stop", "meta")


@dataclass(frozen=True)
class WorkItem:
    """Rows [start, stop) of one stream at one step: a micro-batch, or a slice of one.

    dummies: dummy rows that the loader adds behind the rows of a micro-batch; no pool builds them
    """

    stream: str
    step: int
    start: int
    stop: int
    dummies: int = 0


@dataclass(frozen=True)
class BuilderSetup:
    """Everything another process needs to build batches of a stream; it reads no file but the shards."""

    spec: StreamSpec
    manifests: dict[str, Manifest]
    tokenizer: Tokenizer | None
    cache: CacheSettings | None = None

    @staticmethod
    def of(builder: BatchBuilder) -> BuilderSetup:
        """The setup of a builder."""
        return BuilderSetup(builder.spec, builder.manifests, builder.tokenizer, builder.cache)

    def import_folder(self) -> str | None:
        """The folder in which another process finds the module of the text format; None for one of dromos.

        Raises UserError for a format that no other process can import.
        """
        text = self.spec.text
        if text is None or type(text).__module__.startswith("data_pipeline."):
            return None
        module, name = sys.modules[type(text).__module__], type(text).__qualname__
        if module.__name__ == "__main__" or "<locals>" in name:
            raise UserError(
                f"data.{self.spec.name}.text: workers cannot import the text format {name}, which is defined "
                f"in {'a function' if '<locals>' in name else 'the script itself'}; move it to a module beside the "
                "script, or use no workers"
            )
        if module.__file__ is None:
            return None
        depth = module.__name__.count(".") + (Path(module.__file__).name == "__init__.py")
        return str(Path(module.__file__).resolve().parents[depth])

    def without_content(self) -> BuilderSetup:
        """The setup for a process that needs only the order and places of samples, and imports no text format."""
        return replace(self, spec=replace(self.spec, image=None, text=PackedFormat(1)), tokenizer=None)

    def builder(self) -> BatchBuilder:
        """A new builder with this setup."""
        return BatchBuilder(self.spec, self.manifests, self.tokenizer, self.cache)


def rows_of(rank: int, world_size: int, batch: int) -> tuple[int, int]:
    """Rows [start, stop) of a rank in the global batch; none for some ranks if the batch is below `world_size`."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside of world size {world_size}")
    return rank * batch // world_size, (rank + 1) * batch // world_size


def largest_share(world_size: int, batch: int) -> int:
    """Rows of the rank that has most; the others have as many, or one row less."""
    return -(-batch // world_size)


def micro_batches(start: int, stop: int, micro_batch: int | None) -> list[tuple[int, int]]:
    """Rows [start, stop) as micro-batches of `micro_batch` rows; the last may be smaller. None: one micro-batch.

    No rows are one micro-batch without rows.
    """
    size = micro_batch or max(1, stop - start)
    return [(at, min(at + size, stop)) for at in range(start, max(stop, start + 1), size)]


def items_of(
    specs: Sequence[StreamSpec],
    step: int,
    rank: int,
    world_size: int,
    micro_batch: int | None,
    dummy_rows: bool = True,
) -> Iterator[WorkItem]:
    """Work items of a rank for one step, in the order in which the training loop needs them.

    With `dummy_rows`, items of ranks with fewer rows are filled up: in each stream, all ranks have the same number of
    items of the same sizes. Collectives of the forward need that.
    """
    for spec in specs:
        batch = spec.rows(step)
        start, stop = rows_of(rank, world_size, batch)
        share = largest_share(world_size, batch) if dummy_rows else stop - start
        for first, last in micro_batches(start, start + share, micro_batch):
            rows = min(first, stop), min(last, stop)
            yield WorkItem(spec.name, step, *rows, dummies=last - max(first, rows[1]))


def pixel_shape(spec: StreamSpec, rows: int) -> tuple[int, ...]:
    """Shape of the pixels of `rows` rows; it has no elements if the stream has no images."""
    pixels = spec.arrays.get("pixels")
    return (rows, *pixels.shape) if pixels is not None else (0,)


def split_item(item: WorkItem, spec: StreamSpec, slices: int) -> list[WorkItem]:
    """Split an item into at most `slices` items of nearly equal numbers of rows, in order."""
    rows = item.stop - item.start
    smallest = MIN_IMAGE_ROWS if spec.image is not None or spec.text is None else spec.text.slice_rows
    slices = max(1, min(slices, rows // smallest))
    ends = [item.start + rows * i // slices for i in range(slices + 1)]
    return [replace(item, start=a, stop=b) for a, b in pairwise(ends)]


def join_batches(slices: Sequence[Batch]) -> Batch:
    """Join consecutive slices into one batch: arrays are concatenated, counters and digests summed."""
    if len(slices) == 1:
        return slices[0]
    joined = {
        field.name: _join_values(field.name, [getattr(part, field.name) for part in slices])
        for field in fields(Batch)
    }
    return Batch(**joined | {"stop": slices[-1].stop})


def _join_values(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, list):
        return [element for value in values for element in value]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _join_values(key, [value[key] for value in values if key in value]) for key in keys}
    if name.endswith("digest"):
        return reduce(digest.add, values)
    # Every other number is a counter.
    return first if name in COMMON_FIELDS else sum(values)

"""How a step is cut into work: rows to ranks, rows to micro-batches, and what a worker needs to make one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.batches.batch_builder import BatchMaker
from data_pipeline.batches.spec import StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.tokenizers import Tokenizer


@dataclass(frozen=True)
class Item:
    """One unit of work: a micro-batch of one stream."""

    stream: str
    step: int
    start: int
    stop: int


@dataclass(frozen=True)
class Setup:
    """All that another process needs to make batches of a stream; no file but the shards."""

    spec: StreamSpec
    manifests: dict[str, Manifest]
    tokenizer: Tokenizer | None
    cache: CacheSettings | None = None

    @staticmethod
    def of(maker: BatchMaker) -> Setup:
        return Setup(maker.spec, maker.manifests, maker.tokenizer, maker.cache)

    def maker(self) -> BatchMaker:
        return BatchMaker(self.spec, self.manifests, self.tokenizer, self.cache)


def rows_of(rank: int, world_size: int, batch: int) -> tuple[int, int]:
    """Rows [start, stop) of the global batch that a rank takes. Raises UserError if the ranks cannot share it."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    if batch % world_size:
        below = batch // world_size * world_size
        nearest = [size for size in (below, below + world_size) if size]
        nearest.sort(key=lambda size: (abs(size - batch), size))
        raise UserError(
            f"a batch of {batch} rows cannot be split evenly over {world_size} ranks; nearest that can: "
            f"{' or '.join(map(str, nearest))}"
        )
    rows = batch // world_size
    return rank * rows, (rank + 1) * rows


def micro_batches(start: int, stop: int, micro_batch: int | None) -> list[tuple[int, int]]:
    """Rows [start, stop) in pieces of `micro_batch` rows, the last perhaps smaller; None: one piece."""
    size = micro_batch or max(1, stop - start)
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def items_of(
    specs: Sequence[StreamSpec], step: int, rank: int, world_size: int, micro_batch: int | None
) -> Iterator[Item]:
    """A rank's work of one step, in the order in which it is needed."""
    for spec in specs:
        for start, stop in micro_batches(*rows_of(rank, world_size, spec.rows(step)), micro_batch):
            yield Item(spec.name, step, start, stop)


def check_ranks(specs: Sequence[StreamSpec], world_size: int) -> None:
    """Raise UserError that names the stream whose batch the ranks cannot share."""
    for spec in specs:
        for first, batch in zip(spec.batches.first, spec.batches.rows, strict=True):
            try:
                rows_of(0, world_size, batch)
            except UserError as error:
                where = f" from step {first} on" if len(spec.batches.rows) > 1 else ""
                raise UserError(f"data.{spec.name}.batch{where}: {error}") from None

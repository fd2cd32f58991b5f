"""`Stream`: a deterministic, resumable loader for any training loop; its position is one small JSON object."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.loader.loader import LocalLoader
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.mixture_weights import ShareBy
from data_pipeline.order.stream_order import StreamOrder, stream_seed
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import PackedFormat, TextFormat
from data_pipeline.workers.watchdog import StallLimits


class Stream:
    """Endless iterator over batches of webdataset tars, in an order that depends on the arguments alone.

    The same arguments give the same global batches on any number of ranks and workers: rank r of W receives rows
    [r batch/W, (r+1) batch/W), rounded down. If W does not divide the batch, some ranks receive one row less than
    others, and none if W is larger; `dummy_rows` fills them up. Each epoch visits every sample exactly once. An
    unusable sample is replaced deterministically, from its shard or, after 8 attempts, from its whole source, and
    counted in `batch.skipped`.

        stream = Stream("data/train", batch=256, image=ImageSpec(224), text=TextSpec("clip-bpe", 77))
        for batch in stream:                     # never ends, unless every source has max_epochs
            step(batch.images, batch.tokens)     # uint8 [rows, 3, 224, 224], int32 [rows, 77]
            saved = stream.state()               # JSON; another process continues with stream.resume(saved)

    sources: folder, pattern or file of tars, local or s3://; for a mixture, name -> path or SourceSpec
    batch: rows of the global batch, or first step -> rows for a ramp-up
    image, text: how pixels and text are decoded; TextSpec is for captions, another TextFormat may be your own
    length: short for text=PackedFormat(length): samples are packed sequences of `length` tokens (uint16 or uint32 in
        the tar member `npy`)
    seed, name: the order depends on both, so two streams of one run differ
    lanes: parts of the global batch that read separate parts of each source; default: the largest common divisor of
        all batches up to 1024 (choose_lanes in data_pipeline/order/stream_order.py)
    share_by: "size" or "sqrt" (of the size): how sources without a weight share the rows
    dummy_rows: fill up every rank's batch to that of the rank with most rows, by rows that nothing is read for and
        whose `weights` are 0; a loss must leave them out. For loops whose ranks need batches of one shape
    workers: processes that decode; 0 decodes in one thread of this process
    cache: folder and size of this node's cache of object-store data, filled ahead by a process beside this one
    limits: seconds after which a stalled read or decode is logged, and after which its worker is killed and replaced;
        with workers=0 it is only logged

    Use it as a context manager, or call close(). docs/stream.md lists the guarantees.

    Raises UserError for invalid input, before the first batch where possible. Raises ReadError if bytes cannot be read
    and WorkerError if worker processes die. Both are OSErrors. After either, no sample was replaced, and `state()` is
    still valid.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str | SourceSpec],
        batch: int | Mapping[int, int],
        *,
        image: ImageSpec | None = None,
        text: TextFormat | None = None,
        length: int | None = None,
        seed: int = 0,
        name: str = "stream",
        lanes: int | None = None,
        share_by: ShareBy = "size",
        rank: int = 0,
        world_size: int = 1,
        dummy_rows: bool = False,
        workers: int = 0,
        cache: CacheSettings | None = None,
        limits: StallLimits | None = None,
    ) -> None:
        if length is not None:
            if image is not None or text is not None:
                raise UserError(f"data.{name}: write image and text, or the length of packed text, not both")
            text = PackedFormat(length)
        named = {"source": sources} if isinstance(sources, str) else sources
        specs = {
            key: value if isinstance(value, SourceSpec) else SourceSpec(value) for key, value in named.items()
        }
        self.name = name
        order = stream_seed(seed, "stream", name)
        spec = StreamSpec(name, order, specs, BatchSchedule.of(batch), lanes, image, text, share_by=share_by)
        cache = cache or CacheSettings.of()
        self._set_loader(
            LocalLoader([spec], rank, world_size, workers, limits=limits, cache=cache, dummy_rows=dummy_rows)
        )
        self._builder = self._loader.builders[name]
        self._step = 0
        self._steps: Iterator[dict[str, list[Batch]]] | None = None

    @property
    def step(self) -> int:
        """Batches served so far, counted over resumes."""
        return self._step

    @property
    def order(self) -> StreamOrder:
        """The order of samples: `samples_per_epoch()`, `refs(step)`."""
        return self._builder.order

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._steps is None:
            last = self.order.last_step
            self._steps = self._loader.steps(self._step, sys.maxsize if last is None else last)
        try:
            batch = next(self._steps)[self.name][0]
        except StopIteration:
            raise
        # A generator cannot continue after an exception (Ctrl-C included), so the next call starts a new one.
        except BaseException:
            self._steps = None
            raise
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Position after the last batch served, as a JSON object; valid for any world size and number of workers."""
        return {"stream": self.name, **self.order.state(self._step, self._builder.fingerprints)}

    def resume(self, state: Mapping[str, Any], accept_change: bool = False) -> list[str]:
        """Continue from `state`. Raises UserError with old and new value if the data or the mixture changed.

        With `accept_change` the stream continues with the current data instead, and returns one line for each change
        and for each source with samples that will not be used. Seed and lanes cannot change. A state taken afterwards
        includes the change and resumes without `accept_change`.
        """
        if state.get("stream") != self.name:
            raise UserError(
                f"the state belongs to stream {state.get('stream')!r}, but this stream is {self.name!r}"
            )
        resumed = self.order.resume(state, self._builder.fingerprints, accept_change)
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]  # a generator
            self._steps = None
        if resumed.segments != self._builder.spec.segments:
            self._rebuild_loader(replace(self._builder.spec, segments=resumed.segments))
        self._step = int(state["step"])
        return resumed.changes

    def _rebuild_loader(self, spec: StreamSpec) -> None:
        """Replace the loader by one of the same rank for another specification of the stream."""
        loader = self._loader
        builder = self._builder.with_spec(spec)
        self.close()
        self._builder = builder
        self._set_loader(
            LocalLoader(
                [spec],
                loader.rank,
                loader.world_size,
                loader.workers,
                builders={spec.name: builder},
                limits=loader.limits,
                dummy_rows=loader.dummy_rows,
            )
        )

    def _set_loader(self, loader: LocalLoader) -> None:
        """Use `loader`, and end its workers when this stream is garbage collected, as in a notebook without close()."""
        self._loader = loader
        self._finalizer = weakref.finalize(self, loader.close)
        self._finalizer.atexit = False

    def close(self) -> None:
        """End the workers."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

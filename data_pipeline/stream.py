"""The exact loader for anyone's training loop: an endless iterator whose position is one small dictionary."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec, TextSpec
from data_pipeline.errors import UserError
from data_pipeline.loader.loader import LocalLoader
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.mixture_weights import ShareBy
from data_pipeline.order.stream_order import StreamOrder, stream_seed
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.workers.watchdog import StallLimits


class Stream:
    """Batches of webdataset tars, in an order that is a function of the arguments alone.

    The same arguments give the same global batches on any number of ranks and workers: rank r of W gets rows
    [r batch/W, (r+1) batch/W). Each epoch visits every sample exactly once. An unusable sample is replaced,
    deterministically, and counted in `batch.skipped`.

        stream = Stream("data/train", batch=256, image=ImageSpec(224), text=TextSpec("clip-bpe", 77))
        for batch in stream:                     # never ends, unless every source has max_epochs
            step(batch.images, batch.tokens)     # uint8 [rows, 3, 224, 224], int32 [rows, 77]
            saved = stream.state()               # JSON; another process goes on with stream.resume(saved)

    Parameters: `sources` is a folder or pattern of tars, or name -> path or SourceSpec for a mixture; `batch` is the
    global batch, or first step -> rows; `share_by` ("size" or "sqrt" of it) shares the rows among sources without a
    weight. Without `image` and `text`, samples are packed sequences of `length` tokens (uint16 or uint32 in a member
    `npy`). `workers` processes decode; 0 decodes in a thread of this process. `cache` says where, and how much of,
    what is read of an object store is kept on this node; `limits` says when a read that does not end is named
    and ended. Use it as a context manager, or call close(). docs/stream.md tells what it guarantees.

    Raises UserError for what cannot work, before the first batch where it can be known; ReadError and WorkerError,
    both OSErrors, where bytes cannot be had or processes die: the data never change for it, and the state still holds.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str | SourceSpec],
        batch: int | Mapping[int, int],
        *,
        image: ImageSpec | None = None,
        text: TextSpec | None = None,
        length: int | None = None,
        seed: int = 0,
        name: str = "stream",
        lanes: int | None = None,
        share_by: ShareBy = "size",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        cache: CacheSettings | None = None,
        limits: StallLimits | None = None,
    ) -> None:
        named = {"source": sources} if isinstance(sources, str) else sources
        specs = {
            key: value if isinstance(value, SourceSpec) else SourceSpec(value) for key, value in named.items()
        }
        self.name = name
        order = stream_seed(seed, "stream", name)
        spec = StreamSpec(
            name, order, specs, BatchSchedule.of(batch), lanes, image, text, length, share_by=share_by
        )
        cache = cache or CacheSettings.of()
        self._set_loader(LocalLoader([spec], rank, world_size, workers, limits=limits, cache=cache))
        self._builder = self._loader.builders[name]
        self._step = 0
        self._steps: Iterator[dict[str, list[Batch]]] | None = None

    @property
    def step(self) -> int:
        """Batches served so far, counted over resumes."""
        return self._step

    @property
    def order(self) -> StreamOrder:
        """Which sample stands where: `samples_per_epoch()`, `refs(step)`."""
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
        except BaseException:  # an iterator that raised, or met a Ctrl-C, is at its end; the stream is not
            self._steps = None
            raise
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Position after the last batch served, as JSON; valid for any world size and number of workers."""
        return {"stream": self.name, **self.order.state(self._step, self._builder.fingerprints)}

    def resume(self, state: Mapping[str, Any], accept_change: bool = False) -> list[str]:
        """Go on where `state` was taken. Raises UserError, naming both values, if the data or mixture changed.

        `accept_change` goes on with what is there now and returns what changed and what is left unvisited, in words.
        Seed and lanes cannot change. States taken afterwards know of the change and need no `accept_change`.
        """
        if state.get("stream") != self.name:
            raise UserError(f"the state is of stream {state.get('stream')!r}; this one is {self.name!r}")
        resumed = self.order.resume(state, self._builder.fingerprints, accept_change)
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]  # a generator
            self._steps = None
        if resumed.segments != self._builder.spec.segments:
            self._rebuild_loader(replace(self._builder.spec, segments=resumed.segments))
        self._step = int(state["step"])
        return resumed.changes

    def _rebuild_loader(self, spec: StreamSpec) -> None:
        """The same rank's loader for another specification of the stream."""
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
            )
        )

    def _set_loader(self, loader: LocalLoader) -> None:
        """Take a loader, whose workers end with this stream also where nobody closes it, as in a notebook."""
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

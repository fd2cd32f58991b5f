"""Output of `dromos data index` and `dromos data simulate`: the progress line, and the report as lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_pipeline import storage
from data_pipeline.batches.batch_builder import open_sources
from data_pipeline.errors import UserError
from data_pipeline.loader.simulate import StreamLoad, simulate
from data_pipeline.storage.cache import MAX_DEFAULT_GIGABYTES
from pretrain.build.streams import stream_spec
from pretrain.recipe.load import load_recipe, only_training_stage
from pretrain.recipe.schema import TrainStage

if TYPE_CHECKING:
    from data_pipeline.index.build import IndexResult


MAX_LISTED = 5  # warnings of one kind listed by name
REDRAW_SECONDS = 0.1  # between two updates of the progress line


class ProgressLine:
    """One line on stderr, overwritten in place and erased at the end; nothing if stderr is not a terminal."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._shown = sys.stderr.isatty()
        self._started = self._last = time.monotonic()

    def __call__(self, done: int, total: int, samples: int, size: int) -> None:
        now = time.monotonic()
        if not self._shown or (now - self._last < REDRAW_SECONDS and done < total):
            return
        self._last = now
        rate = size / 1e6 / max(now - self._started, 1e-6)
        line = f"{self._path}: {done:,} of {total:,} shards, {samples:,} samples, {rate:,.0f} MB/s"
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def index_lines(path: str, indexed: IndexResult) -> Iterator[tuple[str, bool]]:
    """The report of an index run as (line, True for a warning)."""
    manifest = indexed.manifest
    shards = f"{len(manifest.paths):,} shards ({indexed.scanned:,} read, {indexed.reused:,} unchanged)"
    size = f"{int(manifest.sizes.sum()) / 1e6:,.1f} MB"
    if indexed.scanned:
        seconds = max(indexed.seconds, 1e-6)
        size += f"; {indexed.bytes / 1e6 / seconds:,.0f} MB/s, {indexed.samples / seconds:,.0f} samples/s"
    yield f"{path}: {shards}, {manifest.samples:,} samples, {size}; {manifest.fingerprint}", False
    for sentence in manifest.left_out.sentences(path).values():
        yield sentence, True
    for sentence, _ in storage.unread_files(path).sentences(path):
        yield sentence, True
    for group in indexed.findings.duplicates[:MAX_LISTED]:
        more = f" and {len(group) - MAX_LISTED:,} more" if len(group) > MAX_LISTED else ""
        yield f"{path}: the same samples are in {', '.join(group[:MAX_LISTED])}{more}; keep one of them", True
    if len(indexed.findings.duplicates) > MAX_LISTED:
        yield (
            f"{path}: {len(indexed.findings.duplicates) - MAX_LISTED} more groups of shards hold the same samples",
            True,
        )
    for shard, keys in list(indexed.findings.split.items())[:MAX_LISTED]:
        yield (
            f"{path}: in {shard} the members of {', '.join(map(repr, keys))} are not adjacent: each piece counts as a "
            "sample; sort the tar by name",
            True,
        )
    if len(indexed.findings.split) > MAX_LISTED:
        count = len(indexed.findings.split) - MAX_LISTED
        yield f"{path}: {count} more shards have samples whose members are not adjacent", True


def simulation_figures(load: StreamLoad, bandwidth: float, target_rate: float | None) -> dict[str, Any]:
    """All numbers of a stream's report. bandwidth: bytes/s per node; target_rate: samples/s of all nodes, or None."""
    most = load.max_samples_per_second(bandwidth)
    return asdict(load) | {
        "gets_a_sample": load.gets_per_sample,
        "node_gets_a_second": (target_rate or most) / load.nodes * load.gets_per_sample,
        "fetched_over_needed": load.traffic,
        "node_bytes": load.node_bytes,
        "all_bytes": load.nodes * load.node_bytes,
        "cache_bytes": load.cache_bytes,
        "first_batch_seconds": load.first_batch_seconds(bandwidth),
        "first_window_seconds": load.first_window_seconds(bandwidth),
        "most_samples_a_second": most,
        "sustained": None if target_rate is None else target_rate <= most,
    }


def simulation_lines(
    load: StreamLoad, bandwidth: float, target_rate: float | None, limit: float
) -> Iterator[tuple[str, bool]]:
    """The report of a stream as (line, True for a problem).

    Units as in `simulation_figures`; limit: bytes of the cache of a node.
    """
    figures = simulation_figures(load, bandwidth, target_rate)
    estimated = "" if load.exact else " (estimated)"
    yield f"{load.name}: {load.batch:,} rows per step in {load.lanes:,} lanes, {load.nodes:,} nodes", False
    yield f"  epoch     {load.epoch_samples:,} samples, {load.epoch_steps:,} steps", False
    share = f"{size(load.node_bytes)} per node, {size(figures['all_bytes'])} in all"
    yield f"  traffic   {share}, {load.traffic:.2f} times the bytes needed{estimated}", False
    rate = "the target rate" if target_rate else "the rate that the bandwidth allows"
    requests = f"{load.gets_per_sample:.4f} GETs per sample; {figures['node_gets_a_second']:,.1f}/s per node"
    yield f"  requests  {requests} at {rate}", False
    tight = load.cache_bytes > limit
    need = (
        f"  cache     {size(load.cache_bytes)} per node for the windows, of {size(limit)} allowed{estimated}"
    )
    yield need + ("; some ranges are fetched twice: raise loader.cache.gigabytes" if tight else ""), tight
    first, window = figures["first_batch_seconds"], figures["first_window_seconds"]
    yield f"  start     first batch after {first:.1f} s, windows in the cache after {window:.1f} s", False
    spread = f"variance of rows per shard: {load.variance:.2f} times that of random sampling"
    yield f"  shuffle   {spread}; {load.pairs:.2f} times the pairs from the same shard", False
    most = f"  rate      at most {figures['most_samples_a_second']:,.0f} samples/s on all nodes"
    if target_rate is not None:
        comparison = "enough for" if figures["sustained"] else "less than"
        most += f": {comparison} the target of {target_rate:,.0f}"
    yield most, figures["sustained"] is False
    yield from table(load)


def table(load: StreamLoad) -> Iterator[tuple[str, bool]]:
    """The sources as a table: size, what a node needs and fetches per epoch of the stream, run and unit sizes."""
    header = ("source", "samples", "size", "shards", "needed", "GETs", "fetched", "touched", "run", "unit")
    rows = [
        (
            source.name,
            f"{source.samples:,}",
            size(source.bytes),
            f"{source.shards:,}",
            f"{source.node_samples:,.0f}",
            f"{source.node_gets:,.0f}",
            size(source.node_bytes),
            f"{source.node_shards:,.0f}",
            f"{source.run:,}",
            f"{source.unit:,}",
        )
        for source in load.sources
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *others = (
            text.rjust(width) if at else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join([first, *others]), False


def size(number: float) -> str:
    """1500000 -> 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def loads_of(path: str, stage: str | None, nodes: int) -> tuple[float, list[StreamLoad]]:
    """(cache bytes of a node, load of each stream) of a training stage. Raises UserError."""
    name = stage or only_training_stage(path)
    recipe = load_recipe(path, runnable=False)
    chosen = recipe.stages.get(name)
    if not isinstance(chosen, TrainStage):
        training = [key for key, item in recipe.stages.items() if isinstance(item, TrainStage)]
        raise UserError(
            f"{path}: {name} is not a training stage; write --stage with one of {', '.join(training)}"
        )
    specs = [stream_spec(key, stream, recipe.run.seed, name) for key, stream in chosen.data.items()]
    gigabytes = chosen.loader.cache.gigabytes
    limit = (MAX_DEFAULT_GIGABYTES if gigabytes is None else gigabytes) * 1e9
    return limit, [simulate(spec, open_sources(spec), nodes, int(limit)) for spec in specs]

"""What `dromos data index` says: one line of progress on a terminal, then one a source, and what is odd about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_pipeline.batches.batch_builder import open_sources
from data_pipeline.batches.work_items import check_ranks
from data_pipeline.errors import UserError
from data_pipeline.loader.simulate import StreamLoad, simulate
from data_pipeline.storage.cache import MOST_GIGABYTES
from pretrain.build.streams import stream_spec
from pretrain.recipe.load import load_recipe, only_training_stage
from pretrain.recipe.schema import TrainStage

if TYPE_CHECKING:
    from data_pipeline.index.build import Indexed


NAMED = 5  # oddities listed by name
EVERY = 0.1  # seconds between two states of the progress line


class ProgressLine:
    """A line that is written over again, on standard error, if that is a terminal; it is wiped at the end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._shown = sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int, samples: int, size: int) -> None:
        now = time.monotonic()
        if not self._shown or (now - self._last < EVERY and done < total):
            return
        self._last = now
        rate = size / 1e6 / max(now - self._began, 1e-6)
        line = f"{self._path}: {done:,} of {total:,} shards, {samples:,} samples, {rate:,.0f} MB/s"
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def index_lines(path: str, indexed: Indexed) -> Iterator[tuple[str, bool]]:
    """(line, True if it tells of something odd)."""
    manifest = indexed.manifest
    shards = f"{len(manifest.paths):,} shards ({indexed.walked:,} walked, {indexed.kept:,} known)"
    size = f"{int(manifest.sizes.sum()) / 1e6:,.1f} MB"
    if indexed.walked:
        seconds = max(indexed.seconds, 1e-6)
        size += f"; {indexed.bytes / 1e6 / seconds:,.0f} MB/s, {indexed.samples / seconds:,.0f} samples/s"
    yield f"{path}: {shards}, {manifest.samples:,} samples, {size}; {manifest.fingerprint}", False
    for group in indexed.findings.same[:NAMED]:
        more = f" and {len(group) - NAMED:,} more" if len(group) > NAMED else ""
        yield f"{path}: the same samples are in {', '.join(group[:NAMED])}{more}; keep one of them", True
    if len(indexed.findings.same) > NAMED:
        yield (
            f"{path}: {len(indexed.findings.same) - NAMED} more groups of shards hold the same samples",
            True,
        )
    for shard, keys in list(indexed.findings.split.items())[:NAMED]:
        yield (
            f"{path}: in {shard} the members of {', '.join(map(repr, keys))} are not adjacent: each piece counts as a "
            "sample; sort the tar by name",
            True,
        )
    if len(indexed.findings.split) > NAMED:
        yield f"{path}: {len(indexed.findings.split) - NAMED} more shards have samples in pieces", True


def simulation_figures(load: StreamLoad, bandwidth: float, wanted: float | None) -> dict[str, Any]:
    """All figures of a stream; `bandwidth` is bytes a second and node, `wanted` samples a second of all nodes."""
    most = load.most_samples_a_second(bandwidth)
    return asdict(load) | {
        "gets_a_sample": load.gets_a_sample,
        "node_gets_a_second": (wanted or most) / load.nodes * load.gets_a_sample,
        "fetched_over_needed": load.traffic,
        "node_bytes": load.node_bytes,
        "all_bytes": load.nodes * load.node_bytes,
        "cache_bytes": load.cache_bytes,
        "first_batch_seconds": load.first_batch_seconds(bandwidth),
        "first_window_seconds": load.first_window_seconds(bandwidth),
        "most_samples_a_second": most,
        "sustained": None if wanted is None else wanted <= most,
    }


def simulation_lines(
    load: StreamLoad, bandwidth: float, wanted: float | None, limit: float
) -> Iterator[tuple[str, bool]]:
    """(line, True if it tells of a problem)."""
    told = simulation_figures(load, bandwidth, wanted)
    walked = "walked through" if load.exact else "estimated: some lanes were walked through for two windows"
    yield f"{load.name}: {load.batch:,} rows a step in {load.lanes:,} lanes, {load.nodes:,} nodes", False
    yield f"  epoch     {load.epoch_samples:,} samples, {load.epoch_steps:,} steps ({walked})", False
    share = f"{size(load.node_bytes)} a node, {size(told['all_bytes'])} in all"
    yield f"  traffic   {share}, {load.traffic:.2f} times what is needed", False
    rate = "asked for" if wanted else "the bandwidth allows"
    asked = f"{load.gets_a_sample:.4f} GETs a sample; {told['node_gets_a_second']:,.1f} a second and node"
    yield f"  requests  {asked} at the rate that {rate}", False
    tight = load.cache_bytes > limit
    need = f"  cache     {size(load.cache_bytes)} a node for the windows, of {size(limit)} allowed"
    yield need + ("; some of it is fetched twice: raise loader.cache.gigabytes" if tight else ""), tight
    first, window = told["first_batch_seconds"], told["first_window_seconds"]
    yield f"  start     first batch after {first:.1f} s, windows in the cache after {window:.1f} s", False
    spread = f"a shard's rows in a batch vary {load.variance:.2f} times as much as in independent draws"
    yield f"  shuffle   {spread}; {load.pairs:.2f} times the pairs from one shard", False
    most = f"  rate      at most {told['most_samples_a_second']:,.0f} samples a second on all nodes"
    if wanted is not None:
        most += f": {'enough for the' if told['sustained'] else 'less than the'} {wanted:,.0f} asked for"
    yield most, told["sustained"] is False
    yield from table(load)


def table(load: StreamLoad) -> Iterator[tuple[str, bool]]:
    """One line a source: what it is, what a node needs and fetches of it in an epoch of the stream, how it is cut."""
    heads = ("source", "samples", "size", "shards", "needed", "GETs", "fetched", "touched", "run", "unit")
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
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
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


def loads_of(path: str, stage: str | None, nodes: int, ranks: int) -> tuple[float, list[StreamLoad]]:
    """Bytes of the cache of a node, and the load of each stream. Raises UserError."""
    name = stage or only_training_stage(path)
    recipe = load_recipe(path, runnable=False)
    chosen = recipe.stages.get(name)
    if not isinstance(chosen, TrainStage):
        training = [key for key, one in recipe.stages.items() if isinstance(one, TrainStage)]
        raise UserError(
            f"{path}: {name} is no training stage; write --stage with one of {', '.join(training)}"
        )
    specs = [stream_spec(key, stream, recipe.run.seed, name) for key, stream in chosen.data.items()]
    check_ranks(specs, nodes * ranks)
    gigabytes = chosen.loader.cache.gigabytes
    limit = (MOST_GIGABYTES if gigabytes is None else gigabytes) * 1e9
    return limit, [simulate(spec, open_sources(spec), nodes, int(limit)) for spec in specs]

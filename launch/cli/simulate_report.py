"""What `dromos data simulate` prints: the load of a recipe's streams, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from data_pipeline.loader.simulate import StreamLoad


def figures(load: StreamLoad, bandwidth: float, wanted: float | None) -> dict[str, Any]:
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


def lines(
    load: StreamLoad, bandwidth: float, wanted: float | None, limit: float
) -> Iterator[tuple[str, bool]]:
    """(line, True if it tells of a problem)."""
    told = figures(load, bandwidth, wanted)
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

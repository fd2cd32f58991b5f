"""What a stream asks of an object store and of the nodes, from its order: traffic, requests, cache, shuffle quality.

Nothing is read but the manifests. A node's epoch of up to 2 million rows is walked through as the prefetcher would;
of a larger one some lanes are, for three windows about its end, and counts follow from the cut of the source, in which
every unit is fetched once an epoch. Bytes of a unit are its samples times the mean of their shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.batches.batch_builder import order_of
from data_pipeline.batches.spec import StreamSpec
from data_pipeline.batches.work_items import rows_of
from data_pipeline.loader.prefetch_plan import window_steps
from data_pipeline.order.stream_order import StreamOrder
from data_pipeline.sources.fetch_units import Units
from data_pipeline.sources.manifest import Manifest

WALKED = 2_000_000  # rows
BATCHES = 8  # that shuffle quality is measured on
UNITS = 1 << 40  # more than a source has
REQUEST_SECONDS = 0.1  # until an object store has answered, taken for the first batch


@dataclass(frozen=True)
class SourceLoad:
    """One source. Figures of a node are for one epoch of the stream.

    samples, bytes: of the source; run, unit: samples read together by the order, and fetched together
    node_samples, node_gets, node_bytes: what a node needs, asks for and fetches; node_shards: shards it touches
    cache_bytes: what a node keeps at once, the present window and the next
    """

    name: str
    samples: int
    bytes: int
    shards: int
    run: int
    unit: int
    node_samples: float
    node_gets: float
    node_bytes: float
    node_shards: float
    cache_bytes: float


@dataclass(frozen=True)
class StreamLoad:
    """One stream on `nodes` nodes.

    exact: whether a whole epoch was walked through
    pairs: pairs of rows of a batch from one shard, over those of independent draws
    variance: of a shard's rows in a batch, over that of independent draws: the topic variance if a shard is a topic
    """

    name: str
    batch: int
    lanes: int
    nodes: int
    epoch_samples: int
    epoch_steps: int
    window_steps: int
    exact: bool
    sources: tuple[SourceLoad, ...]
    sample_bytes: float
    pairs: float
    variance: float

    @property
    def gets_a_sample(self) -> float:
        return sum(s.node_gets for s in self.sources) / sum(s.node_samples for s in self.sources)

    @property
    def traffic(self) -> float:
        """Bytes fetched over bytes needed."""
        useful = sum(s.node_samples * s.bytes / s.samples for s in self.sources)
        return self.node_bytes / useful

    @property
    def node_bytes(self) -> float:
        """Fetched by a node in an epoch."""
        return sum(source.node_bytes for source in self.sources)

    @property
    def cache_bytes(self) -> float:
        return sum(source.cache_bytes for source in self.sources)

    def first_batch_seconds(self, bandwidth: float) -> float:
        """At `bandwidth` bytes a second and node: its rows of the first batch, read sample by sample."""
        return REQUEST_SECONDS + self.batch / self.nodes * self.sample_bytes / bandwidth

    def first_window_seconds(self, bandwidth: float) -> float:
        """Until the window and the next are in the cache."""
        return self.cache_bytes / bandwidth

    def most_samples_a_second(self, bandwidth: float) -> float:
        """Of all nodes together, as far as `bandwidth` bytes a second and node allow."""
        return self.nodes * bandwidth / (self.sample_bytes * self.traffic)


def simulate(
    spec: StreamSpec, manifests: Mapping[str, Manifest], nodes: int, limit_bytes: int, walked: int = WALKED
) -> StreamLoad:
    """The load of a stream from its start on, seen from the first of `nodes` nodes, which cache `limit_bytes` each.

    Local sources count as if they were remote. Raises UserError for what cannot be ordered or shared by the nodes.
    """
    order, batch, names = order_of(spec, manifests), spec.rows(0), list(spec.sources)
    units = {name: Units(manifests[name], None, limit_bytes) for name in names}
    start, stop = rows_of(0, nodes, batch)
    epoch_steps = -(-order.samples_per_epoch() // batch)
    if order.last_step is not None:
        epoch_steps = max(1, min(epoch_steps, order.last_step))
    window = window_steps(order, batch, names)
    exact = epoch_steps * (stop - start) <= walked
    lanes = max(1, (stop - start) * order.lanes // batch)
    shown = lanes if exact else max(1, min(lanes, walked * order.lanes // (batch * 3 * window)))
    if not exact:
        stop = start + shown * batch // order.lanes
    steps = range(epoch_steps)
    if not exact:  # windows are longest where an epoch ends
        most = max(2, min(3 * window, walked // (stop - start)))
        steps = range(max(0, epoch_steps - 2 * most // 3), epoch_steps - 2 * most // 3 + most)
        steps = range(steps.start, min(steps.stop, order.last_step or steps.stop))
    drawn = _draw(order, steps, start, stop)
    sources = []
    for number, name in enumerate(names):
        rows = drawn[:, drawn[1] == number]
        share = order.weights[number] / sum(order.weights)
        node_samples = rows.shape[1] if exact else epoch_steps * batch * share / nodes
        seen = _Seen.of(units[name], rows, window_steps(order, batch, [name]))
        load = (
            seen.counted()
            if exact
            else _expected(units[name], order.sources[number].interleaved, node_samples, nodes)
        )
        kept = seen.most_bytes * (1 if exact else lanes / shown)
        manifest = manifests[name]
        sources.append(
            SourceLoad(
                name,
                manifest.samples,
                int(manifest.sizes.sum()),
                len(manifest.paths),
                units[name].run,
                units[name].length,
                node_samples,
                *load,
                cache_bytes=min(kept, float(manifest.sizes.sum())),
            )
        )
    pairs, variance = _shuffle(order, manifests, np.linspace(0, epoch_steps - 1, BATCHES).astype(int))
    useful = sum(s.node_samples * s.bytes / s.samples for s in sources)
    return StreamLoad(
        spec.name,
        batch,
        order.lanes,
        nodes,
        order.samples_per_epoch(),
        epoch_steps,
        window,
        exact,
        tuple(sources),
        useful / sum(s.node_samples for s in sources),
        pairs,
        variance,
    )


@dataclass(frozen=True)
class _Seen:
    """The units that some rows need. bytes: float [units]; shards: int [units]; most_bytes: kept at once."""

    bytes: np.ndarray
    shards: np.ndarray
    most_bytes: float

    @staticmethod
    def of(units: Units, rows: np.ndarray, window: int) -> _Seen:
        """`rows` are as `_draw` gives them."""
        step, _, epoch, shards, indices = rows
        if not step.size:
            return _Seen(np.zeros(0), np.zeros(0, np.int64), 0.0)
        keys, at, unit = np.unique(
            shards * UNITS + units.number(shards, indices), return_index=True, return_inverse=True
        )
        size = _bytes(units, shards[at], keys % UNITS)
        # Fetched a window ahead of its first use in an epoch, kept until its last.
        epochs = int(epoch.max()) + 1
        kept, first, where = np.unique(unit * epochs + epoch, return_index=True, return_inverse=True)
        last = np.zeros(len(kept), np.int64)
        np.maximum.at(last, where, step)
        change = np.zeros(int(step[-1] - step[0]) + 2)
        np.add.at(change, np.maximum(step[first] - step[0] - window, 0), size[kept // epochs])
        np.add.at(change, last - step[0] + 1, -size[kept // epochs])
        return _Seen(size, shards[at], float(np.cumsum(change).max()))

    def counted(self) -> tuple[float, float, float]:
        """GETs, bytes and shards."""
        return len(self.bytes), float(self.bytes.sum()), len(np.unique(self.shards))


def _draw(order: StreamOrder, steps: Iterable[int], start: int, stop: int) -> np.ndarray:
    """int64 [5, rows]: step, source, epoch, shard and index of the rows [start, stop) of each step."""
    parts = []
    for step in steps:
        refs = order.refs(step, start, stop)
        here = (np.full(len(refs.row), step), refs.source, refs.epoch, refs.shard, refs.index)
        parts.append(np.stack(here))
    return np.concatenate(parts, axis=1)


def _bytes(units: Units, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    low, high = units.samples(shards, numbers)
    manifest = units.manifest
    return np.asarray((high - low) * manifest.sizes[shards] / manifest.counts[shards])


def _expected(units: Units, interleaved: bool, node_samples: float, nodes: int) -> tuple[float, float, float]:
    """GETs, bytes and shards of a node's epoch. Runs belong to one lane; larger units are asked for by many."""
    manifest, counts = units.manifest, units.manifest.counts
    filled = counts > 0
    first, last = units.first[:-1][filled], units.first[1:][filled] - 1
    pieces = float((last // units.length - first // units.length + 1).sum())
    passes = node_samples * nodes / manifest.samples
    share = min(1.0, node_samples / manifest.samples)
    if units.length == units.run and not interleaved:
        drawn = counts[filled] / units.length
        shards = float((1 - (1 - share) ** np.maximum(drawn, 1)).sum())
        return pieces * passes / nodes, float(manifest.sizes.sum()) * passes / nodes, shards
    found = 1 - (1 - share) ** min(units.length, manifest.samples)
    shards = float((1 - (1 - share) ** counts[filled]).sum())
    return pieces * found, float(manifest.sizes.sum()) * found, shards


def _shuffle(order: StreamOrder, manifests: Mapping[str, Manifest], steps: np.ndarray) -> tuple[float, float]:
    """Same-shard pairs of batches and variance of the rows of a shard, both over those of independent draws."""
    pairs = chance = spread = even = 0.0
    for step in np.unique(steps).tolist():
        refs = order.refs(step)
        for number, name in enumerate(source.name for source in order.sources):
            shards = refs.shard[refs.source == number]
            counts, samples = manifests[name].counts, manifests[name].samples
            rows, part = np.bincount(shards, minlength=len(counts)), counts / samples
            pairs += float((rows * (rows - 1)).sum()) / 2
            chance += len(shards) * (len(shards) - 1) / 2 * float((part**2).sum())
            spread += float(((rows - len(shards) * part) ** 2).sum())
            even += len(shards) * float((part * (1 - part)).sum())
    return (pairs / chance if chance else 1.0), (spread / even if even else 1.0)

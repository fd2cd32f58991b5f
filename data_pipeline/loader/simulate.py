"""Predicts traffic, requests, cache size and shuffle quality of a stream from its real order.

Only the manifests are read. Up to 2 million rows per node and epoch, every row is simulated. For more rows, some lanes
are simulated for about three windows near the end of the epoch and the cache size is scaled up to all lanes; requests
and bytes are estimated from the source's units, each fetched once per epoch. The bytes of a unit are its samples times
the mean sample size of their shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.batches.batch_builder import order_of
from data_pipeline.batches.spec import StreamSpec
from data_pipeline.loader.prefetch_plan import window_steps
from data_pipeline.order.stream_order import StreamOrder
from data_pipeline.sources.fetch_units import Units
from data_pipeline.sources.manifest import Manifest

MAX_DRAWN_ROWS = 2_000_000
SHUFFLE_BATCHES = 8  # number of batches used to measure shuffle quality
MAX_UNITS = 1 << 40  # more units than any source has
REQUEST_SECONDS = 0.1  # assumed latency of an object store, for the first batch


@dataclass(frozen=True)
class SourceLoad:
    """Predicted load of one source. `node_` figures are for one node and one epoch of the stream.

    samples, bytes, shards: size of the source
    run, unit: number of samples that the order keeps together, and number fetched together
    node_samples: samples that the node needs; node_gets, node_bytes: its requests and downloaded bytes
    node_shards: shards that it reads from
    cache_bytes: maximum bytes in the cache: the current window and the next
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
    """Predicted load of one stream on `nodes` nodes.

    exact: True if the whole epoch was counted, False if the figures are estimates
    sample_bytes: mean bytes per sample
    pairs: same-shard pairs of rows in a batch, relative to independent draws
    variance: variance of the rows per shard in a batch, relative to independent draws
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
    def gets_per_sample(self) -> float:
        return sum(s.node_gets for s in self.sources) / sum(s.node_samples for s in self.sources)

    @property
    def traffic(self) -> float:
        """Bytes downloaded per byte needed."""
        useful = sum(s.node_samples * s.bytes / s.samples for s in self.sources)
        return self.node_bytes / useful

    @property
    def node_bytes(self) -> float:
        """Bytes that one node downloads per epoch."""
        return sum(source.node_bytes for source in self.sources)

    @property
    def cache_bytes(self) -> float:
        return sum(source.cache_bytes for source in self.sources)

    def first_batch_seconds(self, bandwidth: float) -> float:
        """Seconds to read the first batch sample by sample, at `bandwidth` bytes per second and node."""
        return REQUEST_SECONDS + self.batch / self.nodes * self.sample_bytes / bandwidth

    def first_window_seconds(self, bandwidth: float) -> float:
        """Seconds until the first window and the next are in the cache."""
        return self.cache_bytes / bandwidth

    def max_samples_per_second(self, bandwidth: float) -> float:
        """Samples per second of all nodes together that `bandwidth` bytes per second and node allow."""
        return self.nodes * bandwidth / (self.sample_bytes * self.traffic)


def simulate(
    spec: StreamSpec,
    manifests: Mapping[str, Manifest],
    nodes: int,
    limit_bytes: int,
    max_rows: int = MAX_DRAWN_ROWS,
) -> StreamLoad:
    """Predict the load of a stream from its first step, for the first of `nodes` nodes with caches of `limit_bytes`.

    At most about `max_rows` rows are drawn. Local sources count as if they were remote. Raises UserError if the stream
    has no order.
    """
    # 1. The length of an epoch, and the rows to draw.
    order, batch, names = order_of(spec, manifests), spec.rows(0), list(spec.sources)
    units = {name: Units(manifests[name], None, limit_bytes) for name in names}
    node_rows = (
        0,
        max(1, batch // nodes),
    )  # of the first node, or of one with a row if there are more nodes than rows
    epoch_steps = -(-order.samples_per_epoch() // batch)
    if order.last_step is not None:
        epoch_steps = max(1, min(epoch_steps, order.last_step))
    epoch_rows = epoch_steps * batch
    window = window_steps(order, batch, names)
    extent = _choose_extent(order, batch, node_rows, epoch_steps, window, max_rows)
    drawn = _draw(order, extent)
    # 2. The load of each source: counted in the drawn rows, or estimated.
    sources = [
        _source_load(
            order,
            number,
            manifests[name],
            units[name],
            drawn[:, drawn[1] == number],
            extent,
            epoch_rows,
            nodes,
        )
        for number, name in enumerate(names)
    ]
    # 3. The load of the stream.
    steps = np.linspace(0, epoch_steps - 1, SHUFFLE_BATCHES).astype(int)
    pairs, variance = _shuffle_quality(order, manifests, steps)
    useful = sum(s.node_samples * s.bytes / s.samples for s in sources)
    return StreamLoad(
        spec.name,
        batch,
        order.lanes,
        nodes,
        order.samples_per_epoch(),
        epoch_steps,
        window,
        extent.exact,
        tuple(sources),
        useful / sum(s.node_samples for s in sources),
        pairs,
        variance,
    )


@dataclass(frozen=True)
class _Extent:
    """The simulated rows: rows [start, stop) of each of `steps`, whose global batches have `batch` rows.

    exact: True if this is the node's whole epoch
    lane_factor: the node's lanes per lane drawn
    """

    batch: int
    steps: range
    start: int
    stop: int
    exact: bool
    lane_factor: float


def _choose_extent(
    order: StreamOrder, batch: int, node_rows: tuple[int, int], epoch_steps: int, window: int, max_rows: int
) -> _Extent:
    start, stop = node_rows
    if epoch_steps * (stop - start) <= max_rows:
        return _Extent(batch, range(epoch_steps), start, stop, True, 1)
    lanes = max(1, (stop - start) * order.lanes // batch)
    drawn_lanes = max(1, min(lanes, max_rows * order.lanes // (batch * 3 * window)))
    stop = start + drawn_lanes * batch // order.lanes
    # Near the end of the epoch, where windows last longest.
    count = max(2, min(3 * window, max_rows // (stop - start)))
    first, last = max(0, epoch_steps - 2 * count // 3), epoch_steps - 2 * count // 3 + count
    steps = range(first, min(last, order.last_step or last))
    return _Extent(batch, steps, start, stop, False, lanes / drawn_lanes)


def _source_load(
    order: StreamOrder,
    number: int,
    manifest: Manifest,
    units: Units,
    rows: np.ndarray,
    extent: _Extent,
    epoch_rows: int,
    nodes: int,
) -> SourceLoad:
    """`rows`: int64 [5, rows], the drawn rows of the order's source `number`."""
    source = order.sources[number]
    share = order.weights[number] / sum(order.weights)
    node_samples = rows.shape[1] if extent.exact else epoch_rows * share / nodes
    use = _UnitUse.of(units, rows, window_steps(order, extent.batch, [source.name]))
    if extent.exact:
        gets, size, shards = use.count()
    else:
        gets, size, shards = _estimate(units, source.interleaved, node_samples, nodes)
    source_bytes = manifest.sizes.sum()
    return SourceLoad(
        source.name,
        manifest.samples,
        int(source_bytes),
        len(manifest.paths),
        units.run,
        units.length,
        node_samples,
        gets,
        size,
        shards,
        cache_bytes=min(use.peak_bytes * extent.lane_factor, float(source_bytes)),
    )


@dataclass(frozen=True)
class _UnitUse:
    """The units that the drawn rows need.

    bytes: float [units]; shards: int [units]; peak_bytes: maximum bytes in the cache
    """

    bytes: np.ndarray
    shards: np.ndarray
    peak_bytes: float

    @staticmethod
    def of(units: Units, rows: np.ndarray, window: int) -> _UnitUse:
        """`rows`: int64 [5, rows] from `_draw`; `window`: steps of a window of the source."""
        step, _, epoch, shards, indices = rows
        if not step.size:
            return _UnitUse(np.zeros(0), np.zeros(0, np.int64), 0.0)
        keys, at, unit = np.unique(
            shards * MAX_UNITS + units.numbers(shards, indices), return_index=True, return_inverse=True
        )
        size = _unit_bytes(units, shards[at], keys % MAX_UNITS)
        # A unit is fetched one window before its first use in an epoch, and kept until its last use.
        epochs = int(epoch.max()) + 1
        kept, first, position = np.unique(unit * epochs + epoch, return_index=True, return_inverse=True)
        last = np.zeros(len(kept), np.int64)
        np.maximum.at(last, position, step)
        change = np.zeros(int(step[-1] - step[0]) + 2)
        np.add.at(change, np.maximum(step[first] - step[0] - window, 0), size[kept // epochs])
        np.add.at(change, last - step[0] + 1, -size[kept // epochs])
        return _UnitUse(size, shards[at], float(np.cumsum(change).max()))

    def count(self) -> tuple[float, float, float]:
        """(requests, bytes, shards)."""
        return len(self.bytes), float(self.bytes.sum()), len(np.unique(self.shards))


def _draw(order: StreamOrder, extent: _Extent) -> np.ndarray:
    """int64 [5, rows]: step, source, epoch, shard and index of every row of the extent."""
    parts = []
    for step in extent.steps:
        refs = order.refs(step, extent.start, extent.stop)
        columns = (np.full(len(refs.row), step), refs.source, refs.epoch, refs.shard, refs.index)
        parts.append(np.stack(columns))
    return np.concatenate(parts, axis=1)


def _unit_bytes(units: Units, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    low, high = units.samples(shards, numbers)
    manifest = units.manifest
    return np.asarray((high - low) * manifest.sizes[shards] / manifest.counts[shards])


def _estimate(units: Units, interleaved: bool, node_samples: float, nodes: int) -> tuple[float, float, float]:
    """Estimated (requests, bytes, shards) of a node's epoch.

    One lane reads a whole run; a unit of several runs is read by several lanes.
    """
    manifest, counts = units.manifest, units.manifest.counts
    filled = counts > 0
    first, last = units.first[:-1][filled], units.first[1:][filled] - 1
    unit_count = float((last // units.length - first // units.length + 1).sum())
    passes = node_samples * nodes / manifest.samples
    share = min(1.0, node_samples / manifest.samples)
    if units.length == units.run and not interleaved:
        drawn = counts[filled] / units.length
        shards = float((1 - (1 - share) ** np.maximum(drawn, 1)).sum())
        return unit_count * passes / nodes, float(manifest.sizes.sum()) * passes / nodes, shards
    needed = 1 - (1 - share) ** min(units.length, manifest.samples)
    shards = float((1 - (1 - share) ** counts[filled]).sum())
    return unit_count * needed, float(manifest.sizes.sum()) * needed, shards


def _shuffle_quality(
    order: StreamOrder, manifests: Mapping[str, Manifest], steps: np.ndarray
) -> tuple[float, float]:
    """Same-shard pairs in the batches of `steps`, and variance of the rows per shard, relative to independent draws."""
    pairs = expected_pairs = squared_error = expected_squared_error = 0.0
    for step in np.unique(steps).tolist():
        refs = order.refs(step)
        for number, name in enumerate(source.name for source in order.sources):
            shards = refs.shard[refs.source == number]
            counts, samples = manifests[name].counts, manifests[name].samples
            rows, part = np.bincount(shards, minlength=len(counts)), counts / samples
            pairs += float((rows * (rows - 1)).sum()) / 2
            expected_pairs += len(shards) * (len(shards) - 1) / 2 * float((part**2).sum())
            squared_error += float(((rows - len(shards) * part) ** 2).sum())
            expected_squared_error += len(shards) * float((part * (1 - part)).sum())
    return (
        pairs / expected_pairs if expected_pairs else 1.0,
        squared_error / expected_squared_error if expected_squared_error else 1.0,
    )

"""The predicted load of a stream, against plain loops over its order and against a server that counts requests."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.batches.batch_builder import open_sources, order_of
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.index.build import build_index
from data_pipeline.loader.simulate import simulate
from data_pipeline.order.source_order import run_length
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.stream import Stream
from data_pipeline.transforms.text_formats import PackedFormat
from tests.support.s3_server import faulty_s3
from tests.support.samples import LENGTH, write_packed


def source(name: str, counts: list[int], each: int = 2048) -> Manifest:
    """The manifest of a source that does not exist; its samples have `each` bytes."""
    sizes = np.array(counts) * each
    paths = [f"{shard}.tar" for shard in range(len(counts))]
    return Manifest(name, f"s3://nowhere/{name}", paths, np.array(counts), sizes, "manifest", "")


def spec_of(batch: int, lanes: int | None = None, **sources: float | None) -> StreamSpec:
    specs = {name: SourceSpec(f"s3://nowhere/{name}", weight=weight) for name, weight in sources.items()}
    return StreamSpec("text", 3, specs, batch, lanes, text=PackedFormat(8))


@pytest.mark.parametrize("limit", [0, 1 << 40])
@pytest.mark.parametrize("nodes", [1, 3])
def test_an_epoch_of_a_small_mixture_is_counted(nodes: int, limit: int) -> None:
    manifests = {"a": source("a", [20_001, 0, 1, 15_000]), "b": source("b", [40, 60], 4096)}
    spec = spec_of(240, 12, a=0.9, b=0.1)
    load = simulate(spec, manifests, nodes, limit)
    order = order_of(spec, manifests)
    assert load.exact
    assert load.epoch_steps == math.ceil(order.samples_per_epoch() / 240)

    drawn = [order.refs(step, 0, 240 // nodes) for step in range(load.epoch_steps)]
    for number, manifest in enumerate(manifests.values()):
        run = run_length(manifest.samples)
        length = run
        if limit:
            length *= max(1, (8 << 20) * manifest.samples // (run * int(manifest.sizes.sum())))
        first = np.concatenate([[0], np.cumsum(manifest.counts)])
        shards = np.concatenate([refs.shard[refs.source == number] for refs in drawn])
        indices = np.concatenate([refs.index[refs.source == number] for refs in drawn])
        needed = len(shards)
        uses = set(zip(shards.tolist(), ((first[shards] + indices) // length).tolist(), strict=True))
        each = int(manifest.sizes.sum()) // manifest.samples
        # Every sample of the source counts in the unit of its shard that holds it.
        held = Counter(
            (shard, sample // length)
            for shard, (low, high) in enumerate(itertools.pairwise(first.tolist()))
            for sample in range(low, high)
        )
        sizes = {unit: each * held[unit] for unit in uses}
        found = load.sources[number]
        assert (found.samples, found.run, found.unit) == (manifest.samples, run, length)
        assert found.node_samples == needed
        assert found.node_gets == len(uses)
        assert found.node_shards == len({shard for shard, _ in uses})
        assert found.node_bytes == sum(sizes.values())
        assert found.cache_bytes <= sum(sizes.values())
    assert load.gets_per_sample == sum(s.node_gets for s in load.sources) / sum(
        s.node_samples for s in load.sources
    )
    assert load.max_samples_per_second(1e6) == pytest.approx(nodes * 1e6 / (load.sample_bytes * load.traffic))


def test_estimates_agree_with_a_whole_epoch() -> None:
    manifests = {"a": source("a", [10_007] * 105)}
    spec = spec_of(4096, 64, a=None)
    for nodes in (1, 4):
        exact = simulate(spec, manifests, nodes, 0)
        guess = simulate(spec, manifests, nodes, 0, max_rows=100_000)
        assert exact.exact
        assert not guess.exact
        # Runs that two lanes share, and those of the next epoch that the last step takes, are not in the estimate.
        assert guess.gets_per_sample == pytest.approx(exact.gets_per_sample, rel=0.06)
        assert guess.traffic == pytest.approx(exact.traffic, rel=0.06)
        assert guess.node_bytes == pytest.approx(exact.node_bytes, rel=0.06)
        assert guess.cache_bytes == pytest.approx(
            exact.cache_bytes, rel=0.15
        )  # its peak, of other lanes and steps
        assert guess.sources[0].node_shards == exact.sources[0].node_shards == 105
        # Two windows of every lane, those at the end of an epoch up to twice as long.
        window = 16 * 64 * 2048 * 64 / nodes
        assert 2 * window < exact.cache_bytes < 4 * window
        assert 1 / 64 <= exact.gets_per_sample < 0.017


def test_shuffle_quality_is_that_of_the_batches() -> None:
    manifests = {"a": source("a", [100] * 40)}
    spec = spec_of(400, a=None)
    load = simulate(spec, manifests, 1, 0)
    order = order_of(spec, manifests)
    pairs = variance = 0.0
    steps = np.unique(np.linspace(0, load.epoch_steps - 1, 8).astype(int)).tolist()
    for step in steps:
        rows = Counter(order.refs(step).shard.tolist())
        pairs += sum(math.comb(n, 2) for n in rows.values())
        variance += sum((rows[shard] - 10) ** 2 for shard in range(40)) / 40
    assert load.pairs == pytest.approx(pairs / len(steps) / (math.comb(400, 2) / 40))
    assert load.variance == pytest.approx(variance / len(steps) / (10 * (1 - 1 / 40)))


@pytest.mark.parametrize(("batch", "nodes", "rows"), [(60, 7, 8), (5, 7, 1)])
def test_nodes_that_share_a_batch_unevenly(batch: int, nodes: int, rows: int) -> None:
    """Node 0 of 7 has 8 of 60 rows; of 5 rows a node has one or none."""
    manifests = {"a": source("a", [100])}
    load = simulate(spec_of(batch, a=None), manifests, nodes, 0)
    assert load.exact
    assert load.sources[0].node_samples == load.epoch_steps * rows


def test_a_counting_server_sees_the_predicted_requests(tmp_path: Path) -> None:
    counts = [599] * 3 + [9, 0, 1, 199]  # tars of whole records: padding is no part of a unit
    folder = write_packed(tmp_path / "source", counts)
    build_index(str(folder))
    with faulty_s3() as (root, proxy):
        for path in folder.rglob("*"):
            if path.is_file():
                storage.publish(f"{root}/{path.relative_to(folder)}", path.read_bytes())
        cache = CacheSettings.of(str(tmp_path / "cache"), 0.1)
        with Stream({"a": SourceSpec(root)}, 20, length=LENGTH, cache=cache) as stream:
            spec = stream._builder.spec
            load = simulate(spec, open_sources(spec), 1, cache.limit_bytes)
            proxy.reset_counters()
            for _ in range(load.epoch_steps + 1):
                next(stream)
        seen: set[tuple[str, int, int]] = set()
        for key, asked in proxy.log:
            if key.endswith(".tar"):
                first, last = asked.removeprefix("bytes=").split("-")
                seen.add((key, int(first), int(last)))
        # Samples that were read alone, before the first window was there, lie inside units.
        units = [one for one in seen if not any(_inside(one, other) for other in seen)]
        assert len(units) == load.sources[0].node_gets
        size = sum(high + 1 - low for _, low, high in units)
        assert size == pytest.approx(load.node_bytes, rel=0.01)
        assert proxy.tars()[1] <= 1.1 * load.node_bytes


def _inside(one: tuple[str, int, int], other: tuple[str, int, int]) -> bool:
    return one != other and one[0] == other[0] and other[1] <= one[1] and one[2] <= other[2]

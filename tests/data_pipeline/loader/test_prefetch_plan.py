"""The prefetch plan covers every sample of the order before its step, fetches nothing twice, and keeps its limit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.loader.prefetch_plan import PrefetchPlan, _unit_ranges, window_steps
from data_pipeline.order.source_order import RUNS_PER_WINDOW
from data_pipeline.sources.fetch_units import UNIT_BYTES, Units
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.offset_file import OffsetFile, check_of, pack_starts
from data_pipeline.storage.cache import ByteRange, CacheSettings
from data_pipeline.transforms.text_formats import PackedFormat

BATCH = 64
LANES = 16  # four rows of each lane in every batch


def manifest(folder: Path, name: str, counts: list[int], blocks: int) -> tuple[Manifest, list[np.ndarray]]:
    """Manifest of a remote source without files, with samples of 512 to 512 x `blocks` bytes; their bounds."""
    draws = np.random.default_rng(len(counts))
    packed, places, bounds, at = [], [], [], 0
    for count in counts:
        starts = np.concatenate([[0], np.cumsum(draws.integers(1, blocks + 1, count))]) * 512
        block, width = pack_starts(starts)
        assert width == 2
        packed.append(block)
        places.append(at)
        at += len(block)
        bounds.append(starts)
    (folder / f"{name}.bin").write_bytes(b"".join(packed))
    file = OffsetFile(
        str(folder / f"{name}.bin"),
        np.array(places),
        np.full(len(counts), 2, np.uint8),
        np.array([check_of(block, count) for block, count in zip(packed, counts, strict=True)], np.uint64),
    )
    sizes = np.array([starts[-1] + 1024 for starts in bounds])
    names = [f"{shard}.tar" for shard in range(len(counts))]
    made = Manifest(
        name, f"s3://nowhere/{name}", names, np.array(counts), sizes, "manifest", "", offsets=file
    )
    return made, bounds


def builder_of(tmp_path: Path, sources: dict[str, Manifest], limit: int, **weights: float) -> BatchBuilder:
    specs = {name: SourceSpec(source.root, weight=weights.get(name)) for name, source in sources.items()}
    spec = StreamSpec("text", 7, specs, batch=BATCH, lanes=LANES, text=PackedFormat(8))
    return BatchBuilder(spec, sources, None, CacheSettings(str(tmp_path / "cache"), limit))


def prefetch(plan: PrefetchPlan, steps: range) -> dict[int, list[ByteRange]]:
    """Run the plan as the prefetcher does. Returns step -> units that are fetched before it."""
    found: dict[int, list[ByteRange]] = {step: [] for step in steps}
    for at in steps:
        while (group := plan.next_group(at, steps.stop)) is not None:
            step = group.next_step
            plan.plan_step(group)
            assert group.next_step == step + 1
            assert step < at + group.steps_ahead(at)
        plan.release_before(at)
        while (part := plan.next_fetch()) is not None:
            found[at].append(part)
    return found


def test_of_a_large_source_each_run_is_fetched_once_before_it_is_needed(tmp_path: Path) -> None:
    counts = [9001, 1, 0, 8190] + [10_007] * 104  # more than 64 x 16384 samples
    source, bounds = manifest(tmp_path, "a", counts, 4)
    builder = builder_of(tmp_path, {"a": source}, 1 << 40)
    world, rank, steps = 4, 1, range(5, 755)
    found = prefetch(PrefetchPlan([builder], rank, world, 1 << 40, steps.start), steps)
    window = RUNS_PER_WINDOW * 64 * LANES // BATCH  # steps: each lane has four rows a step
    assert window_steps(builder.order, BATCH, ["a"]) == window + 1

    fetched: list[np.ndarray] = [np.zeros(starts[-1] // 512, bool) for starts in bounds]
    asked = 0
    useful = 0
    for step in steps:
        for part in found[step]:
            shard = int(part.url.rpartition("/")[2].removesuffix(".tar"))
            assert not fetched[shard][part.start // 512 : part.stop // 512].any()  # nothing twice
            fetched[shard][part.start // 512 : part.stop // 512] = True
            asked += 1
        refs = builder.order.refs(step, rank * BATCH // world, (rank + 1) * BATCH // world)
        for shard, index in zip(refs.shard.tolist(), refs.index.tolist(), strict=True):
            start, stop = bounds[shard][index : index + 2]
            assert fetched[shard][start // 512 : stop // 512].all()
            useful += stop - start
    # What was begun and not ended is at most two windows a lane.
    lanes, served = LANES // world, len(steps) * BATCH // world
    assert asked <= (served / 64 + 2 * RUNS_PER_WINDOW * lanes) * 1.01
    assert sum(part.stop - part.start for parts in found.values() for part in parts) <= 1.1 * useful * (
        1 + 2 * window / len(steps)
    )


def test_a_limit_is_kept_and_planning_goes_on_as_it_frees(tmp_path: Path) -> None:
    source, _ = manifest(tmp_path, "a", [10_007] * 105, 4)
    builder = builder_of(tmp_path, {"a": source}, 1 << 40)
    limit = 4_000_000
    plan = PrefetchPlan([builder], 0, 1, limit, 0)
    asked: Counter[ByteRange] = Counter()
    needed: set[ByteRange] = set()
    units = builder.units("a")
    assert units is not None
    for at in range(375):
        while (group := plan.next_group(at, 10**9)) is not None:
            plan.plan_step(group)
        plan.release_before(at)
        while (part := plan.next_fetch()) is not None:
            asked[part] += 1
        assert plan.held_bytes <= limit
        refs = builder.order.refs(at)
        starts, stops = units.ranges(refs.shard, units.numbers(refs.shard, refs.index))
        needed |= {
            units.byte_range(*place)
            for place in zip(refs.shard.tolist(), starts.tolist(), stops.tolist(), strict=True)
        }
    assert plan.is_waiting  # a window is 32 MB here
    assert max(asked.values()) == 1  # what is needed still is neither dropped nor asked for again
    assert len(asked.keys() & needed) > 0.8 * limit / (64 * 1280)


@pytest.mark.parametrize("limit", [1 << 40, 1 << 20])
def test_small_sources_are_fetched_in_larger_units_where_they_fit(tmp_path: Path, limit: int) -> None:
    source, bounds = manifest(tmp_path, "a", [3000] * 40, 8)  # runs of 7
    builder = builder_of(tmp_path, {"a": source}, limit)
    units = builder.units("a")
    assert isinstance(units, Units)
    assert units.run == 7
    assert units.length % 7 == 0
    total = sum(starts[-1] for starts in bounds)
    if limit == 1 << 20:
        assert units.length == 7
        return
    assert 0.8 * UNIT_BYTES < units.length * total / source.samples <= UNIT_BYTES
    shards = np.repeat(np.arange(40), 3000)
    indices = np.tile(np.arange(3000), 40)
    starts, stops = units.ranges(shards, units.numbers(shards, indices))
    want = np.concatenate([bound[:-1] for bound in bounds])
    ends = np.concatenate([bound[1:] for bound in bounds])
    assert (starts <= want).all()
    assert (ends <= stops).all()
    distinct = set(zip(shards.tolist(), starts.tolist(), stops.tolist(), strict=True))
    assert sum(stop - start for _, start, stop in distinct) == total  # they tile the source
    assert len(distinct) <= 0.03 * source.samples


def test_a_piece_of_less_than_four_windows_is_one_window(tmp_path: Path) -> None:
    """A lane consumes it as a whole: 40 samples, at the rows that a lane has in a step."""
    source, _ = manifest(tmp_path, "a", [20 * LANES, 20 * LANES], 4)
    builder = builder_of(tmp_path, {"a": source}, 1 << 40)
    assert window_steps(builder.order, BATCH, ["a"]) == max(4, 40 * LANES // BATCH + 1)


def test_a_mixture_fetches_each_source_at_its_share(tmp_path: Path) -> None:
    large, _ = manifest(tmp_path, "a", [10_007] * 105, 4)
    small, _ = manifest(tmp_path, "b", [50, 60], 4)
    local = Manifest("c", str(tmp_path), ["0.tar"], np.array([1000]), np.array([10**6]), "manifest", "")
    sources = {"a": large, "b": small, "c": local}
    builder = builder_of(tmp_path, sources, 1 << 40, a=2, b=1, c=1)
    found = [
        part
        for parts in prefetch(PrefetchPlan([builder], 0, 1, 1 << 40, 0), range(500)).values()
        for part in parts
    ]
    by_source = {name: [part for part in found if f"/{name}/" in part.url] for name in sources}
    assert not by_source["c"]
    assert len(by_source["b"]) == 2  # each shard once
    # Half of the rows, so that a window lasts twice as long; the small one is not fetched so far ahead.
    assert window_steps(builder.order, BATCH, ["a"]) == 2 * RUNS_PER_WINDOW * 64 * LANES // BATCH + 1
    assert window_steps(builder.order, BATCH, ["b"]) == 4 * RUNS_PER_WINDOW * LANES // BATCH + 1
    assert len(by_source["a"]) == len(set(by_source["a"]))
    assert len(by_source["a"]) <= (500 * BATCH / 2 / 64 + 2 * RUNS_PER_WINDOW * LANES) * 1.01


def test_samples_are_read_alone_for_a_small_part_of_an_epoch(tmp_path: Path) -> None:
    source, _ = manifest(tmp_path, "a", [10_007] * 105, 4)
    large = PrefetchPlan([builder_of(tmp_path, {"a": source}, 1 << 40)], 0, 1, 1 << 40, 0)
    assert large.single_sample_steps() == 105 * 10_007 // 200 // BATCH
    few, _ = manifest(tmp_path, "b", [100], 4)
    assert (
        PrefetchPlan([builder_of(tmp_path, {"b": few}, 1 << 40)], 0, 1, 1 << 40, 0).single_sample_steps() == 1
    )


def test_units_are_fetched_in_the_order_of_their_first_use(tmp_path: Path) -> None:
    source, _ = manifest(tmp_path, "a", [100] * 4, 4)
    units = builder_of(tmp_path, {"a": source}, 1 << 40).units("a")
    assert units is not None
    found = list(_unit_ranges(units, np.array([2, 0, 2, 3, 0, 1]), np.array([5, 9, 6, 0, 9, 50])))
    assert [unit.url for unit in found] == [f"s3://nowhere/a/{shard}.tar" for shard in (2, 0, 3, 1)]

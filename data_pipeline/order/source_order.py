"""One source: how its samples are cut into runs and pieces, and which sample replaces a bad one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.hashing import GOLDEN_RATIO_64, U64, hash64, key64, permute

RUNS_PER_WINDOW = 16  # runs shuffled together, sample by sample
MIN_WINDOWS_PER_PIECE = 4  # a lane's piece of fewer windows is one window
REPLACEMENTS_IN_SHARD = 8  # replacements taken from the bad sample's own shard
# Arrays of at most 128 KB, for which the allocator asks the kernel for no fresh pages.
ROWS_PER_BLOCK = 16_384


class SourcePurpose(IntEnum):
    """What a source's key is used for; frozen by golden values like `hashing.Purpose`."""

    RUNS = 101
    SHORT_RUN = 102
    WINDOW = 103
    REPLACE_IN_SHARD = 104
    REPLACE_IN_SOURCE = 105


def run_length(samples: int) -> int:
    """Neighbours read together: at least 16384 runs a source, so that small sources are shuffled sample by sample."""
    return min(64, max(1, samples // 16384))


@dataclass(frozen=True)
class LaneLayout:
    """How the samples of a source are cut: runs of `run` neighbours, `pieces` that the lanes take in turn.

    A source smaller than `lanes` windows is interleaved: one piece, walked by the draws of all lanes together.
    """

    samples: int
    lanes: int

    @property
    def interleaved(self) -> bool:
        return self.samples < self.lanes * RUNS_PER_WINDOW * run_length(self.samples)

    @property
    def run(self) -> int:
        return 1 if self.interleaved else run_length(self.samples)

    @property
    def pieces(self) -> int:
        return 1 if self.interleaved else self.lanes

    def begun_epochs(self, drawn: np.ndarray) -> tuple[int, int]:
        """Epochs that are begun, and how many samples of them are not visited, after `drawn` [lanes] draws."""
        total = int(drawn.sum())
        if not total:
            return 0, 0
        if self.interleaved:
            epochs = -(-total // self.samples)
        else:
            lane = np.flatnonzero(drawn)
            epochs = int((unroll(lane, drawn[lane] - 1, self.samples, self.pieces)[1] - lane).max()) + 1
        return epochs, epochs * self.samples - total


def unroll(
    lane: np.ndarray, draw: np.ndarray, samples: np.ndarray | int, pieces: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws as if each lane's walk had begun at piece 0, and the pieces they fall in, counted over all epochs."""
    walked = draw + lane * samples // pieces
    return walked, -((-(walked + 1) * pieces) // samples) - 1


class SourceOrder:
    """Samples laid end to end, cut into runs of neighbours, permuted by (seed, epoch), cut into one piece a lane.

    In epoch e lane i walks piece (i + e) mod L of the permuted runs; pieces end at floor(j N / L), so an epoch
    visits every sample exactly once. Inside a piece, windows of 16 runs are shuffled sample by sample, on a grid that
    starts elsewhere in each piece. A piece of fewer than 4 windows is one window: with 2 million samples of one-topic
    shards in batches of 65536, windows of 16 runs gave 4.1 times the topic variance of independent draws, whole pieces
    0.95 times. A source smaller than L windows is not cut: its draws, counted over all lanes, walk one permutation of
    its samples. The grid of runs is the same in every epoch, so that a run can be kept in a cache; the short run at
    the source's end takes any place in the permutation. `first_epoch` is above 0 where the source has had other
    samples before.
    """

    def __init__(self, name: str, counts: np.ndarray, lanes: int, seed: int, first_epoch: int = 0) -> None:
        counts = np.asarray(counts)
        if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
            raise UserError(
                f"source {name!r}: samples by shard must be whole numbers of at least 0, one a shard"
            )
        self.name = name
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.samples = int(self.first[-1])
        if not self.samples:
            raise UserError(f"source {name!r}: its {counts.size} shards hold no samples; check its path")
        self.layout = LaneLayout(self.samples, lanes)
        self.interleaved, self.pieces, self.run = self.layout.interleaved, self.layout.pieces, self.layout.run
        self.windows = self.samples >= MIN_WINDOWS_PER_PIECE * self.pieces * RUNS_PER_WINDOW * self.run
        self.key = int(hash64(seed, key64(name)))
        self.first_epoch = first_epoch

    @cached_property
    def counts_hash(self) -> str:
        """Of the samples by shard."""
        return xxhash.xxh64_hexdigest(self.first.astype("<i8").tobytes())

    def replacement(self, shard: int, index: int, epoch: int, attempt: int) -> tuple[int, int]:
        """Another sample for a bad one: attempts 1 to 8 in its shard, later ones (or where it has no more) anywhere.

        No attempt names the bad sample itself, and attempts in one shard differ from each other.
        """
        if attempt < 1:
            raise ValueError(f"attempt {attempt}: the first replacement of a sample is attempt 1")
        neighbours = int(self.first[shard + 1] - self.first[shard]) - 1
        bad = int(self.first[shard]) + index
        if attempt <= min(REPLACEMENTS_IN_SHARD, neighbours):
            key = hash64(self.key, epoch, SourcePurpose.REPLACE_IN_SHARD, bad)
            other = int(permute(attempt - 1, neighbours, key))
            return shard, other + (other >= index)
        if self.samples == 1:
            raise UserError(
                f"source {self.name!r}: its only sample is unusable and there is no other to replace it"
            )
        key = hash64(self.key, epoch, SourcePurpose.REPLACE_IN_SOURCE, bad)
        other = int(permute(attempt % (self.samples - 1), self.samples - 1, key))
        other += other >= bad
        found = int(np.searchsorted(self.first, other, "right")) - 1
        return found, other - int(self.first[found])


class DrawPosition(NamedTuple):
    """Where draws stand, before any shuffle: epoch, piece, the piece's bounds and the draw's position in the epoch."""

    epoch: np.ndarray
    piece: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    position: np.ndarray


class RunGrid(NamedTuple):
    """Runs of the source of each row (or of the one source): their length, the last one's, full ones, the last's rank.

    `short` is the rank of the short run in the epoch's permutation; `windows` says whether pieces have several.
    """

    run: Any
    tail: Any
    full_runs: Any
    short: Any
    windows: Any

    def rank(self, position: np.ndarray) -> np.ndarray:
        """Rank of the run at each position."""
        after = position >= self.short * self.run + self.tail
        return (position + np.where(after, self.run - self.tail, 0)) // self.run

    def start(self, rank: np.ndarray) -> np.ndarray:
        """Position at which the run of each rank begins."""
        return rank * self.run - np.where(rank > self.short, self.run - self.tail, 0)


class SampleLocator:
    """The draws of a stream's sources; see SourceOrder for the order that they follow."""

    def __init__(self, sources: Sequence[SourceOrder]) -> None:
        def table(values: Sequence[int], dtype: type = np.int64) -> Any:
            return np.array(values, dtype) if len(values) > 1 else dtype(values[0])

        self._samples = table([source.samples for source in sources])
        self._pieces = table([source.pieces for source in sources])
        self._run = table([source.run for source in sources])
        self._windows = table([source.windows for source in sources], np.bool_)
        self._key = table([source.key for source in sources], U64)
        self._first_epoch = table([source.first_epoch for source in sources])
        sizes = np.cumsum([0, *(source.samples for source in sources)])
        shards = np.cumsum([0, *(source.first.size - 1 for source in sources)])
        self._before, self._shards_before = (table(before[:-1].tolist()) for before in (sizes, shards))
        self._first = sources[0].first
        if len(sources) > 1:
            shifted = [source.first[:-1] + n for source, n in zip(sources, sizes[:-1], strict=True)]
            self._first = np.concatenate([*shifted, sizes[-1:]])
        self._mixed = len({source.run > 1 for source in sources}) > 1

    def refs(
        self, source: np.ndarray, lane: np.ndarray, draw: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, shard and index of each draw: the n-th of its lane, or the n-th over all lanes if interleaved."""
        found = np.empty((3, draw.size), np.int64)
        for at in range(0, draw.size, ROWS_PER_BLOCK):
            rows = slice(at, at + ROWS_PER_BLOCK)
            found[:, rows] = self._refs(source[rows], lane[rows], draw[rows])
        return found[0], found[1], found[2]

    def _refs(
        self, source: np.ndarray, lane: np.ndarray, draw: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = source if self._samples.ndim else ()
        place = self._place(k, lane, draw)
        if self._mixed:
            epoch, sample = np.zeros_like(draw), np.zeros_like(draw)
            for rows in (np.flatnonzero(self._run[k] > 1), np.flatnonzero(self._run[k] == 1)):
                part = DrawPosition(*(field[rows] for field in place))
                epoch[rows], sample[rows] = self._samples_at(k[rows], part)
        else:
            epoch, sample = self._samples_at(k, place)
        at = sample + self._before[k]
        in_order = np.argsort(
            at
        )  # a search in order finds its way in the cache: four times as fast, sort included
        shard = np.empty_like(at)
        shard[in_order] = np.searchsorted(self._first, at[in_order], "right") - 1
        return epoch, shard - self._shards_before[k], at - self._first[shard]

    def _place(self, k: Any, lane: np.ndarray, draw: np.ndarray) -> DrawPosition:
        n, pieces = self._samples[k], self._pieces[k]
        lane = np.minimum(lane, pieces - 1)  # an interleaved source has one piece, walked by all lanes
        walked, unrolled = unroll(lane, draw, n, pieces)
        piece = unrolled % pieces
        start, stop = piece * n // pieces, (piece + 1) * n // pieces
        epoch = unrolled - lane + self._first_epoch[k]
        return DrawPosition(epoch, piece, start, stop, start + walked - unrolled * n // pieces)

    def _samples_at(self, k: Any, place: DrawPosition) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample of each place; all of sources with runs of one sample, or all of others."""
        n, run, key = self._samples[k], self._run[k], self._key[k]
        if not place.position.size:
            return place.epoch, place.position
        # One epoch for all rows spares the permutations a hash a row.
        epoch = place.epoch[0] if (place.epoch == place.epoch[0]).all() else place.epoch
        runs_key = hash64(key, epoch, SourcePurpose.RUNS)
        if np.all(run == 1):
            return place.epoch, permute(place.position, n, runs_key)
        full_runs, tail = n // run, n % run
        rank = (hash64(key, epoch, SourcePurpose.SHORT_RUN) % (full_runs + 1).astype(U64)).astype(np.int64)
        grid = RunGrid(run, tail, full_runs, np.where(tail, rank, full_runs), self._windows[k])
        low, high = self._window(place, grid)
        inside = permute(
            place.position - low, high - low, hash64(key, place.epoch, SourcePurpose.WINDOW, low)
        )
        return place.epoch, self._sample(low + inside, grid, runs_key)

    @staticmethod
    def _window(place: DrawPosition, grid: RunGrid) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of each position's window; what the grid cuts off at a piece's ends joins the next full window."""
        if not np.any(grid.windows):
            return place.start, place.stop
        golden = place.piece.astype(U64) * U64(GOLDEN_RATIO_64)
        phase = (golden >> U64(60)).astype(np.int64)  # the 16 runs of a window in golden steps
        first = (grid.rank(place.start) + phase) // RUNS_PER_WINDOW + 1
        last = (grid.rank(place.stop - 1) + phase) // RUNS_PER_WINDOW - 1
        window = np.clip((grid.rank(place.position) + phase) // RUNS_PER_WINDOW, first, last)
        from_start = (window == first) | ~grid.windows
        low = np.where(from_start, place.start, grid.start(window * RUNS_PER_WINDOW - phase))
        to_stop = (window == last) | ~grid.windows
        return low, np.where(to_stop, place.stop, grid.start((window + 1) * RUNS_PER_WINDOW - phase))

    @staticmethod
    def _sample(position: np.ndarray, grid: RunGrid, key: np.ndarray) -> np.ndarray:
        """Sample of the source at each position of its epoch."""
        rank = grid.rank(position)
        last = grid.full_runs - 1
        number = permute(np.minimum(rank - (rank > grid.short), last), grid.full_runs, key)
        number = np.where(rank == grid.short, grid.full_runs, number)
        return number * grid.run + position - grid.start(rank)

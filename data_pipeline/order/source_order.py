"""One source: runs, windows and lanes; the n-th sample of a lane, and the replacement of a bad sample.

Terms: a run is up to 64 neighbouring samples, read together. A window is 16 runs of the permuted epoch, shuffled
sample by sample. A piece is the part of an epoch that one lane serves. Draw n of a lane is the n-th sample that the
lane serves from this source. The order is a pure function of (seed, source name, samples by shard, lanes).
"""

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
MIN_WINDOWS_PER_PIECE = 4  # a piece of fewer windows is shuffled as one window
REPLACEMENTS_IN_SHARD = 8  # the first replacements of a bad sample come from its own shard
# Arrays of at most 128 KB: the allocator reuses memory for them instead of asking the kernel for fresh pages.
ROWS_PER_BLOCK = 16_384


class SourcePurpose(IntEnum):
    """The use of a source's key; pinned by golden values like `hashing.Purpose`."""

    RUNS = 101
    SHORT_RUN = 102
    WINDOW = 103
    REPLACE_IN_SHARD = 104
    REPLACE_IN_SOURCE = 105


def run_length(samples: int) -> int:
    """Samples per run, 1 to 64: at least 16384 runs where possible. Below 32768 samples, a run is one sample."""
    return min(64, max(1, samples // 16384))


@dataclass(frozen=True)
class LaneLayout:
    """Division of a source into runs of `run` neighbours and into `pieces` pieces, one per lane and epoch.

    A source of fewer samples than `lanes` windows is interleaved: all lanes take turns in one permutation of the whole
    source, which is then a single piece.
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
        """Number of epochs begun after `drawn` draws, int64 [lanes], and number of their samples not yet drawn."""
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
    """Returns (draw number counted from piece 0, piece number counted over all epochs)."""
    unrolled = draw + lane * samples // pieces
    return unrolled, -((-(unrolled + 1) * pieces) // samples) - 1


class SourceOrder:
    """Order of one source of N samples over L lanes: runs permuted by (seed, epoch), divided into one piece per lane.

    In epoch e, lane i serves piece (i + e) mod L of the permuted runs. Piece j ends at floor((j + 1) N / L), so an
    epoch visits every sample exactly once. Inside a piece, windows of 16 runs are shuffled sample by sample; the grid
    of windows starts at a different run in each piece. A piece of fewer than 4 windows is shuffled as one window: small
    sources of one-topic shards need that (docs/log.md). A source smaller than L windows is not divided: its draws,
    counted over all lanes, follow one permutation of its samples.

    The runs are the same in every epoch, so that a cache can keep whole runs; the short run at the source's end takes
    any position in the permutation. `first_epoch` is above 0 if the source had other samples earlier in the training.

    Raises UserError if `counts`, the samples by shard, are not whole numbers of at least 0, or are all 0.
    """

    def __init__(self, name: str, counts: np.ndarray, lanes: int, seed: int, first_epoch: int = 0) -> None:
        counts = np.asarray(counts)
        if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
            raise UserError(
                f"source {name!r}: samples by shard must be whole numbers of at least 0, one per shard"
            )
        self.name = name
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.samples = int(self.first[-1])
        if not self.samples:
            raise UserError(f"source {name!r}: its {counts.size} shards contain no samples; check its path")
        self.layout = LaneLayout(self.samples, lanes)
        self.interleaved, self.pieces, self.run = self.layout.interleaved, self.layout.pieces, self.layout.run
        self.windows = self.samples >= MIN_WINDOWS_PER_PIECE * self.pieces * RUNS_PER_WINDOW * self.run
        self.key = int(hash64(seed, key64(name)))
        self.first_epoch = first_epoch

    @cached_property
    def counts_hash(self) -> str:
        """Hash of the samples by shard, 16 hexadecimal digits."""
        return xxhash.xxh64_hexdigest(self.first.astype("<i8").tobytes())

    def replacement(self, shard: int, index: int, epoch: int, attempt: int) -> tuple[int, int]:
        """Shard and index of the sample that replaces a bad one at `attempt` >= 1.

        Attempts 1 to 8 choose from the bad sample's shard while it has further samples, later attempts from the whole
        source. No attempt returns the bad sample itself, and attempts within the shard all differ. Raises UserError if
        the source has no other sample.
        """
        if attempt < 1:
            raise ValueError(f"attempt {attempt}: attempts count from 1")
        neighbours = int(self.first[shard + 1] - self.first[shard]) - 1
        bad = int(self.first[shard]) + index
        if attempt <= min(REPLACEMENTS_IN_SHARD, neighbours):
            key = hash64(self.key, epoch, SourcePurpose.REPLACE_IN_SHARD, bad)
            replacement = int(permute(attempt - 1, neighbours, key))
            return shard, replacement + (replacement >= index)
        if self.samples == 1:
            raise UserError(
                f"source {self.name!r}: its only sample is unusable, and no other sample can replace it"
            )
        key = hash64(self.key, epoch, SourcePurpose.REPLACE_IN_SOURCE, bad)
        replacement = int(permute(attempt % (self.samples - 1), self.samples - 1, key))
        replacement += replacement >= bad
        shard = int(np.searchsorted(self.first, replacement, "right")) - 1
        return shard, replacement - int(self.first[shard])


class DrawPosition(NamedTuple):
    """Positions of draws before any shuffle: epoch, piece, the piece's bounds, position in the epoch; arrays [rows]."""

    epoch: np.ndarray
    piece: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    position: np.ndarray


class RunGrid(NamedTuple):
    """Runs in an epoch's permutation; each field is an array [rows], or a scalar if the stream has one source.

    run, tail: samples of a full run, and of the short run at the source's end (0: there is none)
    full_runs: number of full runs
    short: position of the short run in the permutation of runs; `full_runs` if there is none
    windows: True if pieces are divided into windows
    """

    run: Any
    tail: Any
    full_runs: Any
    short: Any
    windows: Any

    def run_at(self, position: np.ndarray) -> np.ndarray:
        """Position, in the permutation of runs, of the run that holds each sample position."""
        after = position >= self.short * self.run + self.tail
        return (position + np.where(after, self.run - self.tail, 0)) // self.run

    def start(self, run_position: np.ndarray) -> np.ndarray:
        """First sample position of the run at each position of the permutation."""
        return run_position * self.run - np.where(run_position > self.short, self.run - self.tail, 0)


class SampleLocator:
    """Maps draws to samples for all sources of a stream at once, in the order that SourceOrder defines.

    With one source the tables are scalars, so that numpy needs no lookup per row.
    """

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
        """Epoch, shard and index of each draw, int64 [rows] each.

        Draws are counted per lane, or over all lanes if the source is interleaved.
        """
        refs = np.empty((3, draw.size), np.int64)
        for at in range(0, draw.size, ROWS_PER_BLOCK):
            rows = slice(at, at + ROWS_PER_BLOCK)
            refs[:, rows] = self._refs(source[rows], lane[rows], draw[rows])
        return refs[0], refs[1], refs[2]

    def _refs(
        self, source: np.ndarray, lane: np.ndarray, draw: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = source if self._samples.ndim else ()
        place = self._positions(k, lane, draw)
        if self._mixed:
            epoch, sample = np.zeros_like(draw), np.zeros_like(draw)
            for rows in (np.flatnonzero(self._run[k] > 1), np.flatnonzero(self._run[k] == 1)):
                part = DrawPosition(*(field[rows] for field in place))
                epoch[rows], sample[rows] = self._samples_at(k[rows], part)
        else:
            epoch, sample = self._samples_at(k, place)
        at = sample + self._before[k]
        # Searching in ascending order hits the CPU cache: four times as fast, sort included.
        in_order = np.argsort(at)
        shard = np.empty_like(at)
        shard[in_order] = np.searchsorted(self._first, at[in_order], "right") - 1
        return epoch, shard - self._shards_before[k], at - self._first[shard]

    def _positions(self, k: Any, lane: np.ndarray, draw: np.ndarray) -> DrawPosition:
        n, pieces = self._samples[k], self._pieces[k]
        lane = np.minimum(lane, pieces - 1)  # an interleaved source has one piece, shared by all lanes
        number, unrolled_piece = unroll(lane, draw, n, pieces)
        piece = unrolled_piece % pieces
        start, stop = piece * n // pieces, (piece + 1) * n // pieces
        epoch = unrolled_piece - lane + self._first_epoch[k]
        return DrawPosition(epoch, piece, start, stop, start + number - unrolled_piece * n // pieces)

    def _samples_at(self, k: Any, place: DrawPosition) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample number of each position.

        Either all sources here have runs of one sample, or none has.
        """
        n, run, key = self._samples[k], self._run[k], self._key[k]
        if not place.position.size:
            return place.epoch, place.position
        # If all rows are of one epoch, a scalar saves one hash per row.
        epoch = place.epoch[0] if (place.epoch == place.epoch[0]).all() else place.epoch
        runs_key = hash64(key, epoch, SourcePurpose.RUNS)
        if np.all(run == 1):
            return place.epoch, permute(place.position, n, runs_key)
        full_runs, tail = n // run, n % run
        short = (hash64(key, epoch, SourcePurpose.SHORT_RUN) % (full_runs + 1).astype(U64)).astype(np.int64)
        grid = RunGrid(run, tail, full_runs, np.where(tail, short, full_runs), self._windows[k])
        low, high = self._window_bounds(place, grid)
        inside = permute(
            place.position - low, high - low, hash64(key, place.epoch, SourcePurpose.WINDOW, low)
        )
        return place.epoch, self._sample_numbers(low + inside, grid, runs_key)

    @staticmethod
    def _window_bounds(place: DrawPosition, grid: RunGrid) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of each position's window. Partial windows at the ends of a piece join the full window beside them."""
        if not np.any(grid.windows):
            return place.start, place.stop
        golden = place.piece.astype(U64) * U64(GOLDEN_RATIO_64)
        phase = (golden >> U64(60)).astype(np.int64)  # 0 to 15: golden-ratio steps over the 16 runs
        first = (grid.run_at(place.start) + phase) // RUNS_PER_WINDOW + 1
        last = (grid.run_at(place.stop - 1) + phase) // RUNS_PER_WINDOW - 1
        window = np.clip((grid.run_at(place.position) + phase) // RUNS_PER_WINDOW, first, last)
        from_start = (window == first) | ~grid.windows
        low = np.where(from_start, place.start, grid.start(window * RUNS_PER_WINDOW - phase))
        to_stop = (window == last) | ~grid.windows
        return low, np.where(to_stop, place.stop, grid.start((window + 1) * RUNS_PER_WINDOW - phase))

    @staticmethod
    def _sample_numbers(position: np.ndarray, grid: RunGrid, key: np.ndarray) -> np.ndarray:
        """Sample number at each position of its epoch, after the permutation of runs."""
        at = grid.run_at(position)
        last = grid.full_runs - 1
        number = permute(np.minimum(at - (at > grid.short), last), grid.full_runs, key)
        number = np.where(at == grid.short, grid.full_runs, number)
        return number * grid.run + position - grid.start(at)

"""Order of one source: which sample a lane's n-th draw is, computed from the seed, the epoch and nothing else."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.hashing import START, U64, hash64, key64, permute

WINDOW = 16  # runs shuffled together, sample by sample
SHORT = 4  # a lane's piece of fewer windows is one window
TRIES = 8  # replacements taken from the bad sample's own shard


class Use(IntEnum):
    """What a source's key is used for; frozen by golden values like `hashing.Purpose`."""

    RUNS = 101
    SHORT_RUN = 102
    WINDOW = 103
    REPLACE_IN_SHARD = 104
    REPLACE_IN_SOURCE = 105


def run_length(samples: int) -> int:
    """Neighbours read together: at least 16384 runs a source, so that small sources are shuffled sample by sample."""
    return min(64, max(1, samples // 16384))


class Place(NamedTuple):
    """Where draws stand, before any shuffle: epoch, piece, the piece's bounds and the draw's position in the epoch."""

    epoch: np.ndarray
    piece: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    position: np.ndarray


class SourceOrder:
    """Samples laid end to end, cut into runs of neighbours, permuted by (seed, epoch), cut into one piece a lane.

    In epoch e lane i walks piece (i + e) mod L of the permuted runs; pieces end at floor(j N / L), so an epoch
    visits every sample exactly once. Inside a piece, windows of 16 runs are shuffled sample by sample, on a grid that
    starts elsewhere in each piece. A piece of fewer than 4 windows is one window: with 2 million samples of one-topic
    shards in batches of 65536, windows of 16 runs gave 4.1 times the topic variance of independent draws, whole pieces
    0.95 times. A source smaller than L windows is not cut: its draws, counted over all lanes, walk one permutation of
    its samples. The grid of runs is the same in every epoch, so that a run can be kept in a cache; the short run at
    the source's end takes any place in the permutation.
    """

    def __init__(self, name: str, counts: np.ndarray, lanes: int, seed: int) -> None:
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
        run = run_length(self.samples)
        self.interleaved = self.samples < lanes * WINDOW * run
        self.pieces = 1 if self.interleaved else lanes
        self.run = 1 if self.interleaved else run
        self.full_runs, self.tail = divmod(self.samples, self.run)
        self.windows = self.samples >= SHORT * self.pieces * WINDOW * self.run
        self.key = int(hash64(seed, key64(name)))

    def refs(self, lane: np.ndarray, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, shard and index of each draw: the n-th of its lane, or the n-th over all lanes if interleaved."""
        place = self._locate(np.zeros_like(lane) if self.interleaved else lane, draw)
        if not draw.size:
            return place.epoch, place.epoch, place.epoch
        low, high = int(place.epoch.min()), int(place.epoch.max())
        span = np.arange(low, high + 1)
        keys = hash64(self.key, span, Use.RUNS)
        key = (
            keys[0] if low == high else keys[place.epoch - low]
        )  # one key spares the permutation a hash a row
        if self.run == 1:
            sample = permute(place.position, self.samples, key)
        else:
            ranks = hash64(self.key, span, Use.SHORT_RUN) % U64(self.full_runs + 1)
            short = np.where(self.tail, ranks.astype(np.int64), self.full_runs)[place.epoch - low]
            sample = self._sample(self._shuffle(place, short), short, key)
        shard = np.searchsorted(self.first, sample, "right") - 1
        return place.epoch, shard, sample - self.first[shard]

    def draws(self, passes: int) -> int:
        """Draws after which `passes` passes are complete: of each lane, or over all lanes if interleaved."""
        return -(-passes * self.samples // self.pieces)

    def replacement(self, shard: int, index: int, epoch: int, attempt: int) -> tuple[int, int]:
        """Another sample for a bad one: attempts 1 to 8 in its shard, later ones (or where it has no more) anywhere.

        No attempt names the bad sample itself, and attempts in one shard differ from each other.
        """
        if attempt < 1:
            raise ValueError(f"attempt {attempt}: the first replacement of a sample is attempt 1")
        neighbours = int(self.first[shard + 1] - self.first[shard]) - 1
        bad = int(self.first[shard]) + index
        if attempt <= min(TRIES, neighbours):
            key = hash64(self.key, epoch, Use.REPLACE_IN_SHARD, bad)
            other = int(permute(attempt - 1, neighbours, key))
            return shard, other + (other >= index)
        if self.samples == 1:
            raise UserError(
                f"source {self.name!r}: its only sample is unusable and there is no other to replace it"
            )
        key = hash64(self.key, epoch, Use.REPLACE_IN_SOURCE, bad)
        other = int(permute(attempt % (self.samples - 1), self.samples - 1, key))
        other += other >= bad
        found = int(np.searchsorted(self.first, other, "right")) - 1
        return found, other - int(self.first[found])

    def _locate(self, lane: np.ndarray, draw: np.ndarray) -> Place:
        n, pieces = self.samples, self.pieces
        walked = draw + lane * n // pieces  # as if the walk had begun at piece 0
        unrolled = -((-(walked + 1) * pieces) // n) - 1  # last piece that starts at or before `walked`
        piece = unrolled % pieces
        start, stop = piece * n // pieces, (piece + 1) * n // pieces
        return Place(unrolled - lane, piece, start, stop, start + walked - unrolled * n // pieces)

    def _shuffle(self, place: Place, short: np.ndarray) -> np.ndarray:
        """Positions after the shuffle inside their windows."""
        low, high = place.start, place.stop
        if self.windows:
            low, high = self._window(place, short)
        return low + permute(place.position - low, high - low, hash64(self.key, place.epoch, Use.WINDOW, low))

    def _window(self, place: Place, short: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of each position's window; what the grid cuts off at a piece's ends joins the next full window."""
        golden = place.piece.astype(U64) * U64(START)
        phase = (golden >> U64(60)).astype(np.int64)  # the 16 runs of a window in golden steps
        first = (self._rank(place.start, short) + phase) // WINDOW + 1
        last = (self._rank(place.stop - 1, short) + phase) // WINDOW - 1
        window = np.clip((self._rank(place.position, short) + phase) // WINDOW, first, last)
        low = np.where(window == first, place.start, self._run_start(window * WINDOW - phase, short))
        high = np.where(window == last, place.stop, self._run_start((window + 1) * WINDOW - phase, short))
        return low, high

    def _sample(self, position: np.ndarray, short: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Sample of the source at each position of its epoch; `short` is the rank of the short run there."""
        rank = self._rank(position, short)
        number = permute(np.minimum(rank - (rank > short), self.full_runs - 1), self.full_runs, key)
        number = np.where(rank == short, self.full_runs, number)
        return number * self.run + position - self._run_start(rank, short)

    def _rank(self, position: np.ndarray, short: np.ndarray) -> np.ndarray:
        after = position >= short * self.run + self.tail
        return (position + np.where(after, self.run - self.tail, 0)) // self.run

    def _run_start(self, rank: np.ndarray, short: np.ndarray) -> np.ndarray:
        return rank * self.run - np.where(rank > short, self.run - self.tail, 0)

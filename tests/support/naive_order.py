"""Naive reference of StreamOrder: a sequential simulation in loops and lists that shares no code with the closed forms.

Slow and simple on purpose. `simulate_order` draws every row of every step from step 0 on, and derives the effect of a
change of the mixture from the samples that were visited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, getcontext
from fractions import Fraction
from itertools import count
from math import gcd, lcm

import xxhash

getcontext().prec = 60
MASK_64 = 2**64 - 1
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15
RunLength = Callable[[int], int]


@dataclass(frozen=True)
class Source:
    """One source of a mixture: samples by shard, and the keys of its share."""

    name: str
    counts: tuple[int, ...]
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None
    max_epochs: float | None = None
    fingerprint: str = ""

    @property
    def samples(self) -> list[tuple[int, int]]:
        return [(shard, index) for shard, number in enumerate(self.counts) for index in range(number)]


@dataclass(frozen=True)
class Mixture:
    """A mixture from `first_step` on; `batch` is first step -> rows."""

    first_step: int
    sources: tuple[Source, ...]
    batch: dict[int, int]
    by_sqrt: bool = False


@dataclass
class SourceProgress:
    """Progress of a source since its present samples were introduced."""

    source: Source
    first_epoch: int
    passes: Fraction
    by_lane: list[int]
    by_lane_samples: list[Iterator[tuple[int, int, int]]]
    visited: set[tuple[int, int, int]] = field(default_factory=set)

    def left(self) -> int:
        """Samples of begun epochs that were not visited."""
        begun = {epoch for epoch, _, _ in self.visited}
        epochs = range(self.first_epoch, max(begun) + 1) if begun else []
        every = {(epoch, *sample) for epoch in epochs for sample in self.source.samples}
        assert self.visited <= every
        return len(every - self.visited)

    def next_epoch(self) -> int:
        return max((epoch + 1 for epoch, _, _ in self.visited), default=self.first_epoch)


def mix(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK_64
    return x ^ x >> 31


def hashed(*parts: int) -> int:
    found = GOLDEN_RATIO_64
    for part in parts:
        found = mix(found * 0xD1342543DE82EF95 + part & MASK_64)
    return found


def permuted(x: int, n: int, key: int) -> int:
    """Six rounds of multiply, add and xor-shift on 2**bits >= n, repeated until the result is below n."""
    if n == 1:
        return 0
    bits = max(5, (n - 1).bit_length())
    while True:
        for number in range(6):
            part = mix(key + number * GOLDEN_RATIO_64 & MASK_64)
            x = (x * (part | 1) + (part >> 32)) % 2**bits
            x ^= x >> (bits + 1) // 2
        if x < n:
            return x


def shuffled(items: list, key: int) -> list:
    return [items[permuted(place, len(items), key)] for place in range(len(items))]


def is_interleaved(source: Source, lanes: int, run_length: RunLength) -> bool:
    samples = sum(source.counts)
    return samples < lanes * 16 * run_length(samples)


def epoch_pieces(source: Source, lanes: int, seed: int, epoch: int, run_length: RunLength) -> list[list]:
    """One epoch of a source: the (shard, index) of each piece, in order."""
    samples = source.samples
    key = hashed(seed, xxhash.xxh64_intdigest(source.name.encode()))
    if is_interleaved(source, lanes, run_length):
        return [shuffled(samples, hashed(key, epoch, 101))]
    run = run_length(len(samples))
    runs = [samples[at : at + run] for at in range(0, len(samples), run)]
    tail = [runs.pop()] if len(runs[-1]) < run else []
    runs = shuffled(runs, hashed(key, epoch, 101))
    if tail:
        place = hashed(key, epoch, 102) % (len(runs) + 1)
        runs[place:place] = tail
    in_order = [(rank, sample) for rank, one in enumerate(runs) for sample in one]
    edges = [number * len(samples) // lanes for number in range(lanes + 1)]
    pieces = []
    for number in range(lanes):
        piece = in_order[edges[number] : edges[number + 1]]
        if run == 1:
            pieces.append([sample for _, sample in piece])
            continue
        windows = [piece]
        if len(samples) >= 4 * lanes * 16 * run:
            phase = (number * GOLDEN_RATIO_64 & MASK_64) >> 60
            cut = [(rank + phase) // 16 for rank, _ in piece]
            cut = [min(max(one, cut[0] + 1), cut[-1] - 1) for one in cut]
            windows = [[x for x, c in zip(piece, cut, strict=True) if c == one] for one in dict.fromkeys(cut)]
        walked: list = []
        for window in windows:
            low = edges[number] + len(walked)
            walked += shuffled([sample for _, sample in window], hashed(key, epoch, 103, low))
        pieces.append(walked)
    return pieces


def weights_of(mixture: Mixture) -> list[int]:
    """Integer weights, as SourceCounts and `share_by` define them."""
    sizes = []
    for source in mixture.sources:
        size = sum(source.counts) * Fraction(str(source.repeat or 1))
        size = min(size, Fraction(source.cap)) if source.cap else size
        if mixture.by_sqrt:
            root = (Decimal(size.numerator) / Decimal(size.denominator)).sqrt()
            size = Fraction(int(root * 2**20), 2**20)
        sizes.append(size)
    given = [None if s.weight is None else Fraction(str(s.weight)) for s in mixture.sources]
    rest = 1 - sum(weight for weight in given if weight is not None)
    total = sum(size for size, weight in zip(sizes, given, strict=True) if weight is None)
    if all(weight is None for weight in given):
        shares = sizes
    else:
        shares = [
            rest * size / total if weight is None else weight
            for size, weight in zip(sizes, given, strict=True)
        ]
    whole = lcm(*(share.denominator for share in shares))
    return reduced([int(share * whole) for share in shares])


def reduced(weights: list[int]) -> list[int]:
    return [weight // gcd(*weights) for weight in weights]


def rows_at(batch: dict[int, int], step: int) -> int:
    return batch[max(first for first in batch if first <= step)]


@dataclass
class Change:
    """A change of the mixture: unvisited samples of each source that changed or was removed."""

    step: int
    unvisited: dict[str, int]


def simulate_order(
    mixtures: list[Mixture], steps: int, lanes: int, seed: int, run_length: RunLength
) -> Iterator[list[tuple[str, int, int, int]] | Change]:
    """Yield the rows of each step as (source, epoch, shard, index), and a Change before a new mixture.

    Ends before `steps` when all sources have reached their max_epochs.
    """

    def lane_samples(source: Source, lane: int, first_epoch: int) -> Iterator[tuple[int, int, int]]:
        for number in count():
            if (source, first_epoch + number) not in laid_out:
                laid_out[source, first_epoch + number] = epoch_pieces(
                    source, lanes, seed, first_epoch + number, run_length
                )
            pieces = laid_out[source, first_epoch + number]
            for shard, index in pieces[(lane + number) % len(pieces)]:
                yield first_epoch + number, shard, index

    def start(source: Source, first_epoch: int = 0, passes: Fraction = Fraction(0)) -> SourceProgress:
        by_lane_samples = [lane_samples(source, lane, first_epoch) for lane in range(lanes)]
        return SourceProgress(source, first_epoch, passes, [0] * lanes, by_lane_samples)

    def has_ended(drawn: SourceProgress) -> bool:
        if source.max_epochs is None:
            return False
        goal = (Fraction(str(source.max_epochs)) - drawn.passes) * sum(source.counts)
        if is_interleaved(source, lanes, run_length):
            return sum(drawn.by_lane) >= goal
        return all(taken >= goal / lanes for taken in drawn.by_lane)

    laid_out: dict[tuple[Source, int], list[list]] = {}
    known: dict[str, SourceProgress] = {}
    before: tuple[Source, ...] = ()
    for mixture, after in zip(mixtures, [*(m.first_step for m in mixtures[1:]), steps], strict=True):
        unvisited = {}
        names = [source.name for source in mixture.sources]
        for old in before:
            new = next((source for source in mixture.sources if source.name == old.name), None)
            if new is None or (new.counts, new.fingerprint) != (old.counts, old.fingerprint):
                unvisited[old.name] = known[old.name].left()
        for source in mixture.sources:
            if source.name not in known:
                known[source.name] = start(source)
                continue
            drawn = known[source.name]
            if (drawn.source.counts, drawn.source.fingerprint) != (source.counts, source.fingerprint):
                passes = drawn.passes + Fraction(sum(drawn.by_lane), sum(drawn.source.counts))
                known[source.name] = start(source, drawn.next_epoch(), passes)
        if before:
            yield Change(mixture.first_step, unvisited)
        before = mixture.sources
        weights = weights_of(mixture)
        slot = 0
        for step in range(mixture.first_step, after):
            for number, source in enumerate(mixture.sources):
                if weights[number] and has_ended(known[source.name]):
                    weights[number], slot = 0, 0
            if not any(weights):
                return
            weights = reduced(weights)
            cycle = sum(weights)
            stride = cycle * GOLDEN_RATIO_64 >> 64
            while gcd(stride, cycle) != 1:
                stride += 1
            per_lane = rows_at(mixture.batch, step) // lanes
            rows: dict[int, tuple[str, int, int, int]] = {}
            for place in range(per_lane):
                for lane in range(lanes):
                    at = ((slot + place) * stride + lane * cycle // lanes) % cycle
                    owner = next(k for k in range(len(weights)) if at < sum(weights[: k + 1]))
                    drawn = known[names[owner]]
                    shared = is_interleaved(mixture.sources[owner], lanes, run_length)
                    sample = next(drawn.by_lane_samples[0 if shared else lane])
                    assert sample not in drawn.visited, "an epoch holds a sample twice"
                    drawn.visited.add(sample)
                    drawn.by_lane[lane] += 1
                    rows[lane * per_lane + place] = (names[owner], *sample)
            slot += per_lane
            yield [rows[row] for row in range(per_lane * lanes)]

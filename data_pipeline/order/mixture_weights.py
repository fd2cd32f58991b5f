"""What each source gets of a stream: exact shares from weights or sizes, and what contradicts itself in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, isqrt, lcm
from typing import Literal, Protocol

from data_pipeline.errors import UserError

MAX_CYCLE_SLOTS = 2**31  # slots of a cycle: products of two slot numbers stay below 2**63

ShareBy = Literal["size", "sqrt"]  # what the shares of sources without a weight are in proportion to


class ShareSettings(Protocol):
    """How a source's share is set; see order.SourceCounts."""

    @property
    def weight(self) -> float | None: ...
    @property
    def repeat(self) -> float | None: ...
    @property
    def cap(self) -> int | None: ...
    @property
    def max_epochs(self) -> float | None: ...


def exact_fraction(number: float) -> Fraction:
    """The fraction a decimal stands for: 0.1 is 1/10, 0.3333333333333333 is 1/3."""
    fraction = Fraction(str(number))
    if fraction.denominator <= 10**9:
        return fraction
    return fraction.limit_denominator(10**9) or fraction  # what would be rounded to nothing stays as it is


def integer_weights(shares: Sequence[Fraction], names: Sequence[str]) -> tuple[int, ...]:
    """Smallest integers in the proportions of `shares` (> 0), whose sum is the length of the cycle.

    A cycle over 2**31 slots (weights with no common measure) is rounded to 2**31 by largest remainders: an error below
    one sample in two thousand million. Raises UserError for a share so small that it gets no slot.
    """
    whole = lcm(*(share.denominator for share in shares))
    weights = [int(share * whole) for share in shares]
    divisor = gcd(*weights)
    weights = [weight // divisor for weight in weights]
    if sum(weights) > MAX_CYCLE_SLOTS:
        total = sum(weights)
        floors = [weight * MAX_CYCLE_SLOTS // total for weight in weights]
        by_remainder = sorted(range(len(weights)), key=lambda k: (-(weights[k] * MAX_CYCLE_SLOTS % total), k))
        for k in by_remainder[: MAX_CYCLE_SLOTS - sum(floors)]:
            floors[k] += 1
        weights = floors
    for name, weight in zip(names, weights, strict=True):
        if weight == 0:
            raise UserError(
                f"source {name!r}: its share is below one slot in {MAX_CYCLE_SLOTS}; raise its weight or remove it"
            )
    return tuple(weights)


def share_mistake(source: ShareSettings) -> str | None:
    """What is wrong with the share of one source, whatever the others and the counts are."""
    for key in ("weight", "repeat", "cap", "max_epochs"):
        value = getattr(source, key)
        if value is not None and not 0 < value < float("inf"):
            return f"{key} is {value}; it must be a number above 0"
    if source.weight is not None and (source.repeat is not None or source.cap is not None):
        return "weight sets its share, so repeat and cap would change nothing; remove one or the other"
    return None


def source_size(name: str, source: ShareSettings, samples: int) -> Fraction:
    """Size of a source that its share is taken from: samples x repeat, at most cap."""
    wrong = share_mistake(source)
    if wrong is not None:
        raise UserError(f"source {name!r}: {wrong}")
    grown = samples * (Fraction(1) if source.repeat is None else exact_fraction(source.repeat))
    return grown if source.cap is None else min(grown, Fraction(source.cap))


def rounded_sqrt(size: Fraction) -> Fraction:
    """Square root, exact for squares of whole numbers, else rounded down to a multiple of 2**-20, at least that."""
    return Fraction(max(1, isqrt(int(size * 2**40))), 2**20)


def source_shares(
    sources: Mapping[str, ShareSettings], sizes: Sequence[Fraction], by: ShareBy = "size"
) -> list[Fraction]:
    """Shares of the sources, in proportion; see order.SourceCounts. `by` is for sources without a weight."""
    sizes = [rounded_sqrt(size) for size in sizes] if by == "sqrt" else sizes
    given = [None if source.weight is None else exact_fraction(source.weight) for source in sources.values()]
    rest = 1 - sum(weight for weight in given if weight is not None)
    total = sum((size for size, weight in zip(sizes, given, strict=True) if weight is None), Fraction(0))
    if total == 0:
        return [weight for weight in given if weight is not None]
    if all(weight is None for weight in given):
        return list(sizes)
    if rest <= 0:
        bare = [name for name, source in sources.items() if source.weight is None]
        raise UserError(
            f"weights: the given ones add up to {float(1 - rest):g}, "
            f"which leaves nothing of the stream for {', '.join(bare)}; "
            "give every source a weight, or weights that add up to less than 1"
        )
    return [
        rest * size / total if weight is None else weight for size, weight in zip(sizes, given, strict=True)
    ]


def check_shares(sources: Mapping[str, ShareSettings]) -> None:
    """Raise UserError for shares that no number of samples makes possible; nothing is opened."""
    found = source_shares(sources, [source_size(name, source, 1) for name, source in sources.items()])
    if all(source.weight is not None for source in sources.values()):
        integer_weights(found, list(sources))

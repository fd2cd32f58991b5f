"""Exact integer weights of the sources of a mixture, from weights, sizes, repeats and caps.

Shares are fractions, so weights do not depend on floating point. Recipe checks use this module: it imports no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, isqrt, lcm
from typing import Literal, Protocol

from data_pipeline.errors import UserError

MAX_CYCLE_SLOTS = 2**31  # the product of two slot numbers stays below 2**63

# Sources without a weight share in proportion to their size, or to its square root.
ShareBy = Literal["size", "sqrt"]


class ShareSettings(Protocol):
    """The keys that set the share of a source; see stream_order.SourceCounts."""

    @property
    def weight(self) -> float | None: ...
    @property
    def repeat(self) -> float | None: ...
    @property
    def cap(self) -> int | None: ...
    @property
    def max_epochs(self) -> float | None: ...


def exact_fraction(number: float) -> Fraction:
    """The fraction that a decimal number means: 1/10 for 0.1, 1/3 for 0.3333333333333333."""
    fraction = Fraction(str(number))
    return fraction.limit_denominator(10**9) or fraction  # what would round to 0 keeps its exact value


def integer_weights(shares: Sequence[Fraction], names: Sequence[str]) -> tuple[int, ...]:
    """Smallest integers in the proportions of `shares` (each above 0). Their sum is the length of the cycle.

    If the sum exceeds 2**31, it is reduced to 2**31 by largest remainders: an error below one sample in 2 * 10**9.
    Raises UserError if a share is too small for one slot.
    """
    denominator = lcm(*(share.denominator for share in shares))
    weights = [int(share * denominator) for share in shares]
    divisor = gcd(*weights)
    weights = [weight // divisor for weight in weights]
    if sum(weights) > MAX_CYCLE_SLOTS:
        total = sum(weights)
        rounded = [weight * MAX_CYCLE_SLOTS // total for weight in weights]
        by_remainder = sorted(range(len(weights)), key=lambda k: (-(weights[k] * MAX_CYCLE_SLOTS % total), k))
        for k in by_remainder[: MAX_CYCLE_SLOTS - sum(rounded)]:
            rounded[k] += 1
        weights = rounded
    for name, weight in zip(names, weights, strict=True):
        if weight == 0:
            raise UserError(
                f"source {name!r}: its share is below one slot in {MAX_CYCLE_SLOTS}; raise its weight or remove it"
            )
    return tuple(weights)


def share_mistake(source: ShareSettings) -> str | None:
    """The mistake in the share of one source as text, None if there is none; needs no other source and no counts."""
    for key in ("weight", "repeat", "cap", "max_epochs"):
        value = getattr(source, key)
        if value is not None and not 0 < value < float("inf"):
            return f"{key} is {value}; it must be a finite number above 0"
    if source.weight is not None and (source.repeat is not None or source.cap is not None):
        return "weight sets the share, so repeat and cap have no effect; remove weight, or repeat and cap"
    return None


def source_size(name: str, source: ShareSettings, samples: int) -> Fraction:
    """Size of a source for its share: samples x repeat, at most cap. Raises UserError for a mistake in its keys."""
    mistake = share_mistake(source)
    if mistake is not None:
        raise UserError(f"source {name!r}: {mistake}")
    size = samples * (Fraction(1) if source.repeat is None else exact_fraction(source.repeat))
    return size if source.cap is None else min(size, Fraction(source.cap))


def rounded_sqrt(size: Fraction) -> Fraction:
    """Square root, rounded down to a multiple of 2**-20 and at least 2**-20; exact for squares of whole numbers."""
    return Fraction(max(1, isqrt(int(size * 2**40))), 2**20)


def source_shares(
    sources: Mapping[str, ShareSettings], sizes: Sequence[Fraction], share_by: ShareBy = "size"
) -> list[Fraction]:
    """Shares of the sources, in proportion to each other; see stream_order.SourceCounts.

    `sizes` are those of `source_size`; `share_by` applies to sources without a weight. Raises UserError if the weights
    leave nothing for these.
    """
    sizes = [rounded_sqrt(size) for size in sizes] if share_by == "sqrt" else sizes
    weights = [
        None if source.weight is None else exact_fraction(source.weight) for source in sources.values()
    ]
    rest = 1 - sum(weight for weight in weights if weight is not None)
    total = sum((size for size, weight in zip(sizes, weights, strict=True) if weight is None), Fraction(0))
    if total == 0:
        return [weight for weight in weights if weight is not None]
    if all(weight is None for weight in weights):
        return list(sizes)
    if rest <= 0:
        unweighted = [name for name, source in sources.items() if source.weight is None]
        raise UserError(
            f"weights: they add up to {float(1 - rest):g}, "
            f"which leaves nothing of the stream for {', '.join(unweighted)}; "
            "give every source a weight, or use weights that add up to less than 1"
        )
    return [
        rest * size / total if weight is None else weight for size, weight in zip(sizes, weights, strict=True)
    ]


def check_shares(sources: Mapping[str, ShareSettings]) -> None:
    """Raise UserError for shares that are invalid whatever the data is. Opens no source."""
    shares = source_shares(sources, [source_size(name, source, 1) for name, source in sources.items()])
    if all(source.weight is not None for source in sources.values()):
        integer_weights(shares, list(sources))

"""Weights of a mixture: exact integers from shares and sizes, rounding of long cycles, and the mistakes of a recipe."""

from __future__ import annotations

import re
from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from itertools import combinations
from math import gcd
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.order import mixture_weights
from data_pipeline.order.mixture_weights import (
    MAX_CYCLE_SLOTS,
    check_shares,
    exact_fraction,
    integer_weights,
    rounded_sqrt,
    share_mistake,
    source_size,
)
from data_pipeline.order.stream_order import SourceCounts, StreamOrder


def weights_of(*sources: SourceCounts) -> tuple[int, ...]:
    return StreamOrder(sources, 8, None, 0).weights


def source(name: str, samples: int, **keys: Any) -> SourceCounts:
    return SourceCounts(name, np.array([samples]), **keys)


def test_a_decimal_is_the_fraction_it_stands_for() -> None:
    assert exact_fraction(0.1) == Fraction(1, 10)
    assert exact_fraction(1 / 3) == Fraction(1, 3)
    assert exact_fraction(1e-7) == Fraction(1, 10**7)
    assert exact_fraction(3) == 3
    assert exact_fraction(0.123456789) == Fraction(123_456_789, 10**9)
    assert exact_fraction(1 / 999_999_937) == Fraction(1, 999_999_937)
    assert exact_fraction(1 / 1_000_000_007) == Fraction(1, 10**9)  # denominators end there
    assert exact_fraction(1e-25) == Fraction(1, 10**25)  # but nothing is rounded to 0


def test_weights_follow_shares_or_sizes() -> None:
    assert weights_of(source("a", 5, weight=0.1), source("b", 5, weight=0.3), source("c", 5, weight=0.6)) == (
        1,
        3,
        6,
    )
    assert weights_of(source("a", 5, weight=1 / 3), source("b", 5, weight=2 / 3)) == (1, 2)
    assert weights_of(source("a", 300), source("b", 100)) == (3, 1)
    assert weights_of(source("a", 300, repeat=0.5), source("b", 100, repeat=3)) == (1, 2)
    assert weights_of(source("a", 300, cap=200), source("b", 100, repeat=3, cap=100)) == (2, 1)
    # the half that a leaves is split by size between b and c
    assert weights_of(source("a", 7, weight=0.5), source("b", 300), source("c", 100)) == (4, 3, 1)


def test_shares_close_to_nothing_are_shares() -> None:
    tiny = [source("a", 50, weight=1e-12), source("b", 50, weight=3e-12)]
    assert weights_of(*tiny) == (1, 3)
    assert weights_of(tiny[0]) == weights_of(source("a", 50, repeat=1e-15)) == (1,)
    assert StreamOrder([source("a", 50, repeat=1e-30)], 8, None, 0, share_by="sqrt").weights == (1,)
    with pytest.raises(UserError, match="'a': its share is below one slot"):
        weights_of(tiny[0], source("b", 50, weight=1))


def test_an_epoch_of_the_stream_counts_sizes() -> None:
    sources = [source("a", 300, repeat=0.5), source("b", 100, repeat=3, cap=250), source("c", 7)]
    assert StreamOrder(sources, 8, None, 0).samples_per_epoch() == 150 + 250 + 7


def test_a_cycle_too_long_is_rounded_to_the_limit() -> None:
    shares = [Fraction(3_000_000_019), Fraction(1_000_000_007), Fraction(1000)]
    weights = integer_weights(shares, ["a", "b", "c"])
    assert sum(weights) == MAX_CYCLE_SLOTS == 2**31
    assert all(abs(w - s * MAX_CYCLE_SLOTS / sum(shares)) < 1 for w, s in zip(weights, shares, strict=True))
    with pytest.raises(UserError, match="'b'"):
        integer_weights([Fraction(10**11), Fraction(1)], ["a", "b"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_largest_remainders_are_those_of_all_subsets(shares: list[int]) -> None:
    """Brute force with a limit of 24 slots: of all ways to round shares up, that of the largest remainders."""
    limit, names = 24, [f"s{k}" for k in range(len(shares))]
    reduced = [share // gcd(*shares) for share in shares]
    exact = [Fraction(share * limit, sum(shares)) for share in shares]
    floors = [int(share) for share in exact]
    ways = combinations(range(len(shares)), limit - sum(floors))  # in order: among equals the first names
    up = max(ways, key=lambda way: sum(exact[k] - floors[k] for k in way))
    rounded = [floor + (k in up) for k, floor in enumerate(floors)]
    want = reduced if sum(reduced) <= limit else rounded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_weights, "MAX_CYCLE_SLOTS", limit)
        if all(want):
            assert integer_weights([Fraction(share, 7) for share in shares], names) == tuple(want)
        else:
            with pytest.raises(
                UserError, match=f"source 's{want.index(0)}': its share is below one slot in 24"
            ):
                integer_weights([Fraction(share) for share in shares], names)


def test_a_root_is_rounded_down_and_never_to_nothing() -> None:
    with localcontext() as context:
        context.prec = 60
        for size in (Fraction(2), Fraction(10, 3), Fraction(3_000_000_007), Fraction(1, 10**6)):
            root = (Decimal(size.numerator) / size.denominator).sqrt() * 2**20
            assert rounded_sqrt(size) == Fraction(int(root.to_integral_value(ROUND_FLOOR)), 2**20)
    assert [rounded_sqrt(Fraction(n * n)) for n in (1, 3, 10**6)] == [1, 3, 10**6]
    assert rounded_sqrt(Fraction(1, 2**50)) == Fraction(1, 2**20)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([source("a", 0)], ["'a'", "no samples"]),
        ([source("a", 5), source("a", 6)], ["different names"]),
        ([], ["one or more sources"]),
        ([source("a", 5, weight=1.5), source("b", 5)], ["1.5", "b", "every source a weight"]),
        ([source("a", 5, weight=0.5, repeat=2)], ["'a'", "repeat"]),
        ([source("a", 5, weight=-1)], ["'a'", "weight is -1"]),
        ([source("a", 5, max_epochs=float("nan"))], ["'a'", "max_epochs is nan"]),
        ([SourceCounts("a", np.array([3, -1]))], ["'a'", "whole numbers"]),
        ([SourceCounts("a", np.array([1.5]))], ["'a'", "whole numbers"]),
    ],
)
def test_mistakes_in_a_mixture_name_the_source(sources: list[SourceCounts], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        StreamOrder(sources, 8, None, 0)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("key", ["weight", "repeat", "cap", "max_epochs"])
def test_a_share_is_a_finite_number_above_zero(key: str) -> None:
    for value in (0, -0.5, float("inf"), float("-inf"), float("nan")):
        mistake = f"{key} is {value}; it must be a finite number above 0"
        assert share_mistake(source("a", 5, **{key: value})) == mistake
        with pytest.raises(UserError, match=re.escape(f"source 'a': {mistake}")):
            source_size("a", source("a", 5, **{key: value}), 5)
    assert share_mistake(source("a", 5, **{key: 1e-9})) is None


@pytest.mark.parametrize("without_effect", [{"repeat": 2}, {"cap": 3}, {"repeat": 2, "cap": 3}])
def test_a_weight_allows_neither_repeat_nor_cap(without_effect: dict[str, int]) -> None:
    assert "repeat and cap have no effect" in str(share_mistake(source("a", 5, weight=1, **without_effect)))
    assert share_mistake(source("a", 5, **without_effect)) is None


@pytest.mark.parametrize("sizes", [(300, None, None), (300, 0.5, None), (300, 2, 450), (300, 2, 700)])
def test_a_size_is_samples_by_repeat_up_to_the_cap(sizes: tuple[int, float | None, int | None]) -> None:
    samples, repeat, cap = sizes
    size = source_size("a", source("a", samples, repeat=repeat, cap=cap), samples)
    assert size == min(samples * (repeat or 1), cap or 10**9)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.8)])
def test_weights_that_leave_nothing_for_others_are_refused(weights: tuple[float, float]) -> None:
    sources = [source("a", 5, weight=weights[0]), source("b", 5), source("c", 5, weight=weights[1])]
    words = rf"they add up to {sum(weights):g}, which leaves nothing of the stream for b, d; give every"
    with pytest.raises(UserError, match=words):
        weights_of(*sources, source("d", 9))
    with pytest.raises(UserError, match=words):
        check_shares({one.name: one for one in (*sources, source("d", 9))})


def test_shares_are_checked_without_counts() -> None:
    """Sizes are unknown then, so only shares that are wrong for any sizes are refused."""
    check_shares({"a": source("a", 0, weight=0.25), "b": source("b", 0, repeat=1e-12)})
    check_shares({"a": source("a", 0), "b": source("b", 0, repeat=1e-12)})
    check_shares({"a": source("a", 0, weight=1), "b": source("b", 0, weight=1e-9)})
    with pytest.raises(UserError, match="'b': its share is below one slot"):
        check_shares({"a": source("a", 0, weight=1), "b": source("b", 0, weight=1e-12)})
    with pytest.raises(UserError, match="source 'b': repeat is 0"):
        check_shares({"a": source("a", 0), "b": source("b", 0, repeat=0)})

"""Hash and permutation against published values, plain Python integers and pinned golden values."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.hashing import Purpose, hash64, key64, mix64, permute

WORD = 2**64
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
whole = st.integers(0, WORD - 1)


def plain_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def plain_hash(*parts: int) -> int:
    h = GOLDEN_GAMMA
    for part in parts:
        h = plain_mix((h * 0xD1342543DE82EF95 + part) % WORD)
    return h


def plain_permute(x: int, n: int, key: int) -> int:
    bits = max(5, (n - 1).bit_length())
    keys = [plain_mix((key + r * GOLDEN_GAMMA) % WORD) for r in range(6)]
    while n > 1:
        for k in keys:
            x = (x * (k | 1) + (k >> 32)) % 2**bits
            x ^= x >> (bits + 1) // 2
        if x < n:
            return x
    return 0


pytestmark = pytest.mark.filterwarnings(
    "error"
)  # sums and products wrap by design, so numpy must not warn of it


def test_mix64_makes_the_published_splitmix64_sequence() -> None:
    states = [(i * GOLDEN_GAMMA) % WORD for i in (1, 2, 3)]
    assert [int(mix64(state)) for state in states] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_key64_is_xxh64() -> None:
    assert key64("") == 0xEF46DB3751D8E999  # published test vector of XXH64, seed 0
    assert key64("a") == 0xD24EC4F1A98C6E5B
    assert key64("digits\udcff") != key64("digits")  # a file name that is not UTF-8


def test_purposes_keep_their_numbers() -> None:
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "CROP": 1, "FLIP": 2, "IMAGE_MASK": 3, "TEXT_MASK": 4, "CAPTION": 5, "REPLACE": 6, "DROPOUT": 7,
    }  # fmt: skip


def test_golden_values() -> None:
    assert mix64(np.arange(3)).tolist() == [0, 6238072747940578789, 15839785061582574730]
    key = [3832931612188937417, 10270216018744270286, 5210815293675303511]
    assert hash64(7, np.arange(3), Purpose.CROP).tolist() == key
    order = [5, 18, 14, 16, 13, 7, 1, 3, 6, 4, 9, 11, 15, 8, 10, 2, 12, 19, 0, 17]
    assert permute(np.arange(20), 20, 12345).tolist() == order
    large = [8899960332077, 29163349479202, 29959745695157, 11670093762436, 9500571054611, 14355163016132]
    assert permute(np.arange(6) * 1_000_003, 2**45 - 1, WORD - 1).tolist() == large


@settings(max_examples=100, deadline=None)
@given(st.lists(whole, min_size=1, max_size=5))
def test_hash64_equals_plain_integers(parts: list[int]) -> None:
    assert int(hash64(*parts)) == plain_hash(*parts)


def test_hash64_broadcasts_and_wraps_negative_numbers() -> None:
    grid = hash64(3, np.arange(4)[:, None], np.arange(-2, 3))
    assert grid.shape == (4, 5)
    assert grid.dtype == np.uint64
    assert [[plain_hash(3, i, j % WORD) for j in range(-2, 3)] for i in range(4)] == grid.tolist()
    assert int(hash64(1, 2)) != int(hash64(2, 1))
    numbers = [
        -1,
        -WORD // 2,
        WORD - 1,
        WORD,
        2 * WORD + 5,
    ]  # of any size, as they are or as their last 64 bits
    assert [int(hash64(3, n)) for n in numbers] == [plain_hash(3, n % WORD) for n in numbers]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), whole)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_permute_equals_plain_integers_for_mixed_sizes_and_keys(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.one_of(st.integers(1, 40), st.integers(1, 2**51)), min_size=1, max_size=6))
    xs = [data.draw(st.integers(0, n - 1)) for n in sizes]
    keys = data.draw(st.lists(whole, min_size=len(sizes), max_size=len(sizes)))
    got = permute(np.array(xs), np.array(sizes), np.array(keys, np.uint64))
    assert got.tolist() == [plain_permute(x, n, key) for x, n, key in zip(xs, sizes, keys, strict=True)]


def test_permute_broadcasts() -> None:
    rows, sizes = np.array([[0], [1], [11]]), np.array([12, 32, 33, 70])
    keys = hash64(np.arange(24)).reshape(2, 3, 4)
    for n in (sizes, 33):
        for key in (keys, keys[:, :1, :1], 7):
            got = permute(rows, n, key)
            x, size, k = (
                a.ravel().tolist() for a in np.broadcast_arrays(rows, n, np.asarray(key, np.uint64))
            )
            assert got.shape == np.broadcast_shapes(rows.shape, np.shape(n), np.shape(key))
            assert got.dtype == np.int64
            assert got.ravel().tolist() == [plain_permute(*one) for one in zip(x, size, k, strict=True)]


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 63, 64, 65, 2**51 - 1, 2**51, 2**51 + 1, 2**52 - 1])
def test_permute_at_powers_of_two(n: int) -> None:
    xs = sorted({0, min(1, n - 1), n // 2, n - 1})
    assert permute(np.array(xs), n, 99).tolist() == [plain_permute(x, n, 99) for x in xs]
    assert int(permute(n - 1, n, WORD - 1)) == plain_permute(n - 1, n, WORD - 1)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_permute_takes_every_order_of_a_few_equally_often(n: int) -> None:
    orders = list(permutations(range(n)))
    expected = 60
    keys = hash64(np.arange(expected * len(orders)), n)[:, None]
    seen = Counter(map(tuple, permute(np.arange(n), n, keys).tolist()))
    chi2 = sum((seen[order] - expected) ** 2 / expected for order in orders)
    freedom = len(orders) - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("n", [1024, 36_000_000, 10**12])
def test_neighbours_are_not_neighbours_after_permute(n: int) -> None:
    count = min(n, 200_000)
    gaps = np.concatenate([np.diff(permute(np.arange(count), n, key)) % n for key in range(200_000 // count)])
    bins = 32
    seen = np.bincount(gaps * bins // n, minlength=bins)
    assert abs(seen / gaps.size - 1 / bins).max() < 0.25 / bins

"""Digests: every field changes them, the hashed bytes are as documented, the sum does not depend on order."""

from __future__ import annotations

import struct
from itertools import combinations
from typing import Any

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order.digest import add, hex16, row_digest

ROW: dict[str, Any] = {
    "stream": "pairs", "row": 17, "source": "digits", "shard_path": "train/00003.tar", "index": 9,
    "attempt": 0, "epoch": 2, "crop": (1, 2, 30, 31, 0), "caption": 1,
}  # fmt: skip


def test_golden_values() -> None:
    assert hex16(row_digest(**ROW)) == "1cc21816f113871b"
    assert hex16(row_digest("text", 0, "books", "a.tar", 0, 0, 0, (), 0)) == "363a746ff01c7b47"


def test_digest_is_xxh64_of_the_stated_bytes() -> None:
    data = struct.pack("<6q5q", 17, 9, 0, 2, 1, 5, 1, 2, 30, 31, 0)
    for text in (b"pairs", b"digits", b"train/00003.tar"):
        data += struct.pack("<q", len(text)) + text
    assert row_digest(**ROW) == xxhash.xxh64_intdigest(data)


def test_every_field_changes_the_digest() -> None:
    others = {
        "stream": "text", "row": 18, "source": "scenes", "shard_path": "train/00004.tar", "index": 10,
        "attempt": 1, "epoch": 3, "crop": (1, 2, 30, 31, 1), "caption": 0,
    }  # fmt: skip
    digests = [row_digest(**ROW)] + [row_digest(**{**ROW, key: value}) for key, value in others.items()]
    # text that moves over a border of two fields, and a number that moves from the crop to its neighbour
    digests.append(row_digest(**{**ROW, "stream": "pairsdigits", "source": ""}))
    digests.append(row_digest(**{**ROW, "source": "digitstrain", "shard_path": "/00003.tar"}))
    digests.append(row_digest(**{**ROW, "crop": ()}))
    assert all(a != b for a, b in combinations(digests, 2))


def test_numpy_integers_and_odd_names_are_taken() -> None:
    assert row_digest(**{**ROW, "row": np.int64(17), "crop": np.array([1, 2, 30, 31, 0])}) == row_digest(
        **ROW
    )
    assert row_digest(**{**ROW, "shard_path": "caf\udce9.tar"}) != row_digest(
        **{**ROW, "shard_path": "cafe.tar"}
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.randoms())
def test_sum_is_modulo_2_64_in_any_order(digests: list[int], random: Any) -> None:
    total = 0
    for digest in random.sample(digests, len(digests)):
        total = add(total, digest)
    assert total == sum(digests) % 2**64
    assert int(hex16(total), 16) == total
    assert len(hex16(total)) == 16

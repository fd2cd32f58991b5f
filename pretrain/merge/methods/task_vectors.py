"""What is left of a difference between a model and its base, said in a few numbers that any pass can go by."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.merge.merge_plan import Term


@dataclass(frozen=True)
class Cut:
    """The largest entries of a difference: keys above `key`, and those equal to it before element `end`.

    A key is the bits of the magnitude as float32; they sort as the numbers do, NaN last and all alike.
    """

    key: int
    end: int


NOTHING = Cut(0x7FFFFFFF, 0)
"""no entry is that large"""


@dataclass(frozen=True)
class Part:
    """Of x - base, x the term: the other entries are zero.

    key: of pretrain.merge.methods.dare, the entries chosen by it stay; None where nothing is dropped at random.
    cut: the entries in it stay; None where nothing is trimmed.
    top: the entries in it go, as they are too large; None where nothing is.
    """

    term: Term
    key: bytes | None = None
    cut: Cut | None = None
    top: Cut | None = None

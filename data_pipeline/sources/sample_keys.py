"""Matches the keys of a tar with the keys in a table or list: a tar that was packed again has folders before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence


def match_keys(keys: Sequence[str], listed: Collection[str]) -> list[str]:
    """For each key of a tar the listed key that names it; the key itself if there is none.

    A key that is not listed is tried without its first folders: `tar -cf 00000.tar 00000/` makes `00000/000000007` or
    `./00000/000000007` of img2dataset's `000000007`. A listed key that so names two samples names neither.
    """
    if all(key in listed for key in keys):
        return list(keys)
    names = [
        key if key in listed else next((name for name in shorter_keys(key) if name in listed), key)
        for key in keys
    ]
    times = Counter(names)
    return [key if times[name] > 1 else name for key, name in zip(keys, names, strict=True)]


def shorter_keys(key: str) -> Iterator[str]:
    """The key without its first folder, without its first two, and so on."""
    while "/" in key:
        key = key.partition("/")[2]
        yield key

"""What `dromos data index` says: one line of progress on a terminal, then one a source, and what is odd about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.index.build import Indexed

NAMED = 5  # oddities listed by name
EVERY = 0.1  # seconds between two states of the progress line


class ProgressLine:
    """A line that is written over again, on standard error, if that is a terminal; it is wiped at the end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._shown = sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int, samples: int, size: int) -> None:
        now = time.monotonic()
        if not self._shown or (now - self._last < EVERY and done < total):
            return
        self._last = now
        rate = size / 1e6 / max(now - self._began, 1e-6)
        line = f"{self._path}: {done:,} of {total:,} shards, {samples:,} samples, {rate:,.0f} MB/s"
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def lines(path: str, indexed: Indexed) -> Iterator[tuple[str, bool]]:
    """(line, True if it tells of something odd)."""
    manifest = indexed.manifest
    shards = f"{len(manifest.paths):,} shards ({indexed.walked:,} walked, {indexed.kept:,} known)"
    size = f"{int(manifest.sizes.sum()) / 1e6:,.1f} MB"
    if indexed.walked:
        seconds = max(indexed.seconds, 1e-6)
        size += f"; {indexed.bytes / 1e6 / seconds:,.0f} MB/s, {indexed.samples / seconds:,.0f} samples/s"
    yield f"{path}: {shards}, {manifest.samples:,} samples, {size}; {manifest.fingerprint}", False
    for group in indexed.findings.same[:NAMED]:
        more = f" and {len(group) - NAMED:,} more" if len(group) > NAMED else ""
        yield f"{path}: the same samples are in {', '.join(group[:NAMED])}{more}; keep one of them", True
    if len(indexed.findings.same) > NAMED:
        yield (
            f"{path}: {len(indexed.findings.same) - NAMED} more groups of shards hold the same samples",
            True,
        )
    for shard, keys in list(indexed.findings.split.items())[:NAMED]:
        yield (
            f"{path}: in {shard} the members of {', '.join(map(repr, keys))} are not adjacent: each piece counts as a "
            "sample; sort the tar by name",
            True,
        )
    if len(indexed.findings.split) > NAMED:
        yield f"{path}: {len(indexed.findings.split) - NAMED} more shards have samples in pieces", True

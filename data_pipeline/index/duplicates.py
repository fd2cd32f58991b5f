"""Shards that seem to hold the same samples, and samples whose members are not adjacent: told, not judged."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from data_pipeline import storage
from data_pipeline.index.shard_record import Record

LOOKED_AT = 3  # pieces of each of two shards with equal headers that are compared
PIECE = 64 << 10


@dataclass(frozen=True)
class Findings:
    """same: groups of shard paths with the same samples; split: shard path -> keys whose members lie apart."""

    same: list[list[str]]
    split: dict[str, list[str]]


def find(root: str, records: Sequence[Record]) -> Findings:
    """Compare shards. Equal headers alone prove nothing where keys count from 0 and members have one size, so
    pieces of the content are compared too."""
    alike: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        if record.count:
            alike[record.fingerprint, record.size].append(record)
    same = []
    for group in alike.values():
        if len(group) > 1:
            by_content: dict[int, list[str]] = defaultdict(list)
            for record in group:
                by_content[_content(storage.join(root, record.path), record.size)].append(record.path)
            same += [paths for paths in by_content.values() if len(paths) > 1]
    split = {record.path: json.loads(record.split) for record in records if record.split != "[]"}
    return Findings(same, split)


def _content(url: str, size: int) -> int:
    state = xxhash.xxh64()
    for piece in range(LOOKED_AT):
        start = (size - min(size, PIECE)) * piece // (LOOKED_AT - 1)
        state.update(storage.read_range(url, start, min(PIECE, size - start)))
    return state.intdigest()

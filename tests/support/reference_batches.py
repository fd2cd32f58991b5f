"""Batches of a loader beside the rows of the reference: pixels, tokens, keys, identities, counts, digests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.naive_order import hashed
from tests.support.reference.draws import name_hash
from tests.support.reference.rows import Row


def check_batch(batch: Any, rows: Sequence[Row]) -> None:
    """All fields of a batch, bit for bit, against the same rows of the global batch."""
    assert batch.stop - batch.start == len(rows)
    assert batch.tokens.tolist() == [row.tokens for row in rows]
    assert batch.used.tolist() == [row.used for row in rows]
    assert batch.row_keys.tolist() == [row.key for row in rows]
    assert batch.sample_ids.tolist() == [hashed(name_hash(row.sample[0]), *row.sample[1:]) for row in rows]
    assert (batch.weights == 1).all()
    if batch.pixels is not None:
        np.testing.assert_array_equal(batch.pixels, np.stack([row.pixels for row in rows]))
    assert batch.samples == Counter(row.sample[0] for row in rows)
    assert batch.order_digest == sum(row.order_digest for row in rows) % 2**64
    assert batch.batch_digest == sum(row.batch_digest for row in rows) % 2**64
    skipped: dict[str, Counter[str]] = {}
    for row in rows:  # a row counts once, under the reason of the sample that was assigned to it
        for _, reason in row.attempts[:1]:
            skipped.setdefault(row.sample[0], Counter())[reason] += 1
    assert batch.skipped == skipped
    tried = [attempt for row in rows for attempt in row.attempts]
    assert [(line["key"], line["reason"]) for line in batch.bad] == tried

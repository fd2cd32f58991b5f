"""What a merge makes infinite or NaN of finite numbers: counted while it is written, recorded, told at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.merge.merge_plan import TensorJob
from pretrain.merge.methods.blocks import Block

EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
"""bits that are all set in infinities and NaN"""
LISTED = 3


def born(block: Block, job: TensorJob, stored: np.ndarray) -> int:
    """Of the block's stored elements those that are not finite though all inputs are."""
    found = _not_finite(stored, job.dtype)
    if not found.any():
        return 0
    for term in job.reads:
        found &= ~_not_finite(block.stored(term), block.sources[term.source].info(term.name)[0])
    return int(np.count_nonzero(found))


def _not_finite(stored: np.ndarray, dtype: str) -> np.ndarray:
    bits = np.ascontiguousarray(stored).view(f"<u{stored.itemsize}")
    ones = bits.dtype.type(EXPONENT[dtype])
    return np.equal(np.bitwise_and(bits, ones), ones)


def note(records: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What merge.json of these outputs, by name, says of it and what to do, for people; None where nothing overflowed.

    Of several outputs the worst is told, and how many others there are.
    """
    counts = {name: sum((record.get("overflow") or {}).values()) for name, record in records.items()}
    worst = max(counts, key=lambda name: counts[name], default=None)
    if worst is None or not counts[worst]:
        return None
    found: Mapping[str, int] = records[worst]["overflow"]
    most = sorted(found.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {count:,}" for name, count in most[:LISTED])
    more = f", and {len(most) - LISTED:,} more tensors" if len(most) > LISTED else ""
    dtypes = {str(job["dtype"]) for job in records[worst]["jobs"] if job["name"] in found}
    do = (
        "--dtype bf16 or fp32 has room for them"
        if dtypes == {"F16"}
        else "take smaller weights or --dtype fp32"
    )
    others = sum(count > 0 for count in counts.values()) - 1
    too = f"{others:,} other outputs have" if others > 1 else "1 other output has"
    return (
        f"{worst}: {counts[worst]:,} elements became infinite or NaN, though all inputs are finite there: too large "
        f"for {' and '.join(sorted(dtypes))} ({named}{more}); {do}"
        + (f". {too} such elements too" if others else "")
        + ". merge.json lists all under overflow"
    )

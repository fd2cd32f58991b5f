"""Counts elements that a merge made infinite or NaN from finite inputs, and formats the warning about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.merge.merge_plan import TensorJob
from pretrain.merge.methods.blocks import Block

# Bits that are all set in infinities and NaN, and in no finite number.
EXPONENT_BITS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
LISTED_TENSORS = 3  # in the warning


def count_overflows(block: Block, job: TensorJob, stored: np.ndarray) -> int:
    """Number of the block's stored elements that are infinite or NaN although all inputs are finite there."""
    overflowed = _not_finite(stored, job.dtype)
    if not overflowed.any():
        return 0
    for term in job.reads:
        overflowed &= ~_not_finite(block.stored(term), block.sources[term.source].info(term.name)[0])
    return int(np.count_nonzero(overflowed))


def _not_finite(stored: np.ndarray, dtype: str) -> np.ndarray:
    bits = np.ascontiguousarray(stored).view(f"<u{stored.itemsize}")
    ones = bits.dtype.type(EXPONENT_BITS[dtype])
    return np.equal(np.bitwise_and(bits, ones), ones)


def overflow_warning(records: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A warning about the output with the most overflowed elements and what to do; None if no output has any.

    records: name of an output -> its merge.json.
    """
    counts = {name: sum((record.get("overflow") or {}).values()) for name, record in records.items()}
    worst = max(counts, key=lambda name: counts[name], default=None)
    if worst is None or not counts[worst]:
        return None
    by_tensor: Mapping[str, int] = records[worst]["overflow"]
    most = sorted(by_tensor.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {count:,}" for name, count in most[:LISTED_TENSORS])
    more = f", and {len(most) - LISTED_TENSORS:,} more tensors" if len(most) > LISTED_TENSORS else ""
    dtypes = {str(job["dtype"]) for job in records[worst]["jobs"] if job["name"] in by_tensor}
    advice = (
        "use --dtype bf16 or fp32, which have a larger range"
        if dtypes == {"F16"}
        else "use smaller weights or --dtype fp32"
    )
    others = sum(count > 0 for count in counts.values()) - 1
    also = f"{others:,} other outputs have" if others > 1 else "1 other output has"
    return (
        f"{worst}: {counts[worst]:,} elements became infinite or NaN although all inputs are finite there: too large "
        f"for {' and '.join(sorted(dtypes))} ({named}{more}); {advice}"
        + (f". {also} such elements too" if others else "")
        + ". merge.json lists all of them under overflow"
    )

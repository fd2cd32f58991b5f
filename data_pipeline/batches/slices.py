"""An item of work cut over several workers, and their rows put together again: rows do not depend on one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import Item
from data_pipeline.order import digest

# Rows below which it is not worth to cut: a row of images takes milliseconds, one of packed text microseconds.
LEAST_IMAGES = 8
LEAST_TEXT = 256
# Fields of a batch that its parts have in common, or that are said of the whole.
WHOLE = ("stream", "step", "start", "stop", "pixels", "meta")


def pixel_shape(spec: StreamSpec, rows: int) -> tuple[int, int, int, int]:
    """Of the pixels of so many rows; without bytes in a stream of text."""
    size = spec.image.size if spec.image is not None else 0
    return rows, size, size, 3


def cut(item: Item, spec: StreamSpec, pieces: int) -> list[Item]:
    """At most so many items of nearly equal numbers of rows, in order."""
    rows = item.stop - item.start
    pieces = max(1, min(pieces, rows // (LEAST_TEXT if spec.packed else LEAST_IMAGES)))
    ends = [item.start + rows * i // pieces for i in range(pieces + 1)]
    return [replace(item, start=a, stop=b) for a, b in pairwise(ends)]


def join(parts: Sequence[Batch]) -> Batch:
    """The batch of the parts' rows, which follow on one another: arrays end to end, counters and digests summed."""
    if len(parts) == 1:
        return parts[0]
    joined = {
        field.name: _together(field.name, [getattr(part, field.name) for part in parts])
        for field in fields(Batch)
    }
    return Batch(**joined | {"stop": parts[-1].stop})


def _together(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, list):
        return [each for value in values for each in value]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _together(key, [value[key] for value in values if key in value]) for key in keys}
    if name.endswith("digest"):
        return reduce(digest.add, values)
    # What remains inside a dictionary is a counter; what remains of the batch is the same in every part.
    return first if name in WHOLE else sum(values)

"""All that is random about a row, drawn for a whole batch at once from the rows' keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.hashing import Purpose, hash64

# A crop that does not fit into its image is drawn again so many times at most.
TRIES = 10


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's: `crop`, four integers below 2**64 a try; whether it is mirrored; `caption`, below 2**64."""

    crop: list[int]
    mirror: bool
    caption: int


def draw_rows(keys: np.ndarray) -> list[Draw]:
    """Draws of rows with these keys, uint64 [rows]; a row's depend on its key alone."""
    crops = hash64(keys[:, None], Purpose.CROP, np.arange(4 * TRIES, dtype=np.uint64)).tolist()
    mirrors = (hash64(keys, Purpose.FLIP) & np.uint64(1)).astype(bool).tolist()
    captions = hash64(keys, Purpose.CAPTION).tolist()
    return [Draw(*row) for row in zip(crops, mirrors, captions, strict=True)]

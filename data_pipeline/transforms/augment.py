"""All that is random about a row, drawn for a whole batch at once from the rows' keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, repeat

import numpy as np

from data_pipeline.hashing import Purpose, hash64
from data_pipeline.transforms.crops import Try

# A crop that does not fit into its image is drawn again so many times at most.
TRIES = 10
RATIO_BITS = 24
# (16/9)^(1/2), (16/9)^(1/4), ...: products of these are log-uniform. exp() is avoided because its last bit
# differs between C libraries, and so, once in a while, would the crop; roots and products never do.
RATIO_ROOTS = tuple(accumulate(repeat(0, RATIO_BITS - 1), lambda root, _: math.sqrt(root), initial=4 / 3))


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's: tries for its crop, see `crops.choose_crop`; whether it is mirrored; `caption`, below 2**64."""

    crop: list[Try]
    mirror: bool
    caption: int


def draw_rows(keys: np.ndarray) -> list[Draw]:
    """Draws of rows with these keys, uint64 [rows]; a row's depend on its key alone.

    A try's area is uniform in 0..1, its aspect ratio log-uniform in 3/4..4/3.
    """
    crops = hash64(keys[:, None], Purpose.CROP, np.arange(4 * TRIES, dtype=np.uint64))
    of_area, of_ratio, of_x, of_y = (crops[:, part::4] for part in range(4))
    shares = ((of_area >> np.uint64(11)) / 2.0**53).tolist()
    ratios = _log_uniform_ratios(of_ratio).tolist()
    tries = zip(shares, ratios, of_x.tolist(), of_y.tolist(), strict=True)
    mirrors = (hash64(keys, Purpose.FLIP) & np.uint64(1)).astype(bool).tolist()
    captions = hash64(keys, Purpose.CAPTION).tolist()
    return [
        Draw(list(zip(*row, strict=True)), mirror, caption)
        for row, mirror, caption in zip(tries, mirrors, captions, strict=True)
    ]


def _log_uniform_ratios(draws: np.ndarray) -> np.ndarray:
    """Ratios in [3/4, 4/3), log-uniform, from the upper bits of 64-bit draws."""
    ratios = np.full(draws.shape, 0.75)
    for bit, root in enumerate(RATIO_ROOTS):
        ratios[(draws >> np.uint64(63 - bit) & np.uint64(1)).astype(bool)] *= root
    return ratios

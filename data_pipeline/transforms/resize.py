"""Antialiased bicubic resize by a compiled kernel, bit-identical to Pillow.

The caller uses Pillow if the kernel was not built or the arrays do not have the layout it needs.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from data_pipeline import native

# left, top, right, bottom in pixels of the array; fractions are allowed.
Inner = tuple[float, float, float, float]


@cache
def kernel() -> Any:
    """The function of resize.c, compiled when the package was installed; None if there was no compiler."""
    found = native.load_function(__file__, "_resize", "dromos_resize")
    if found is not None:
        box = [ctypes.c_float] * 4
        size = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
        found.argtypes = [ctypes.c_void_p, *size, *box, ctypes.c_void_p, *[ctypes.c_int] * 3]
    return found


def resize(
    pixels: np.ndarray, box: Inner, out: np.ndarray, mirror: bool = False, plain: bool = False
) -> bool:
    """Resize `box` of `pixels`, uint8 [height, width, 3], to `out`, uint8 [size, size, 3]; mirror it on request.

    Bicubic and antialiased, along rows, then along columns, with the same bits as Pillow's `resize` in these two steps.
    `pixels` may be a view of a larger array: only each row must be contiguous. Pixels outside of it have no influence.
    `plain` uses no vector instructions. Returns False, with `out` unchanged, if there is no kernel or the arrays have
    another layout. Raises MemoryError.
    """
    function = kernel()
    height, width, _ = pixels.shape
    row_stride, pixel_stride, channel_stride = pixels.strides
    if (
        function is None
        or channel_stride != 1
        or (pixel_stride != 3 and width > 1)
        or not out.flags.c_contiguous
    ):
        return False
    size = out.shape[0]
    failed = function(
        pixels.ctypes.data, width, height, row_stride, *box, out.ctypes.data, size, int(mirror), int(plain)
    )
    if failed:
        raise MemoryError(f"no memory to resize {width} x {height} pixels")
    return True

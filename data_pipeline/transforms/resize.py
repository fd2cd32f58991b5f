"""The fast resize: a small compiled kernel that gives Pillow's bits, where it could be built; else Pillow does it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from data_pipeline import native

Inner = tuple[float, float, float, float]


@cache
def kernel() -> Any:
    """The function of resize.c, built by setuptools when the package was installed; None where no compiler was."""
    found = native.load_function(__file__, "_resize", "dromos_resize")
    if found is not None:
        box = [ctypes.c_float] * 4
        size = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
        found.argtypes = [ctypes.c_void_p, *size, *box, ctypes.c_void_p, *[ctypes.c_int] * 3]
    return found


def resize(
    pixels: np.ndarray, box: Inner, out: np.ndarray, mirror: bool = False, plain: bool = False
) -> bool:
    """`box` (left, top, right, bottom) of uint8 [height, width, 3], mirrored if so asked, to `out` [size, size, 3].

    `pixels` may be a cut-out: its rows are contiguous, not the whole. Bicubic, antialiased, along rows, then along
    columns, with the same bits as Pillow's `resize` in these two steps. Pixels outside the array do not bleed in. False
    where there is no kernel, or the arrays are laid out otherwise. `plain` leaves vector instructions alone.
    """
    function = kernel()
    height, width, _ = pixels.shape
    stride, step, one = pixels.strides
    if function is None or one != 1 or (step != 3 and width > 1) or not out.flags.c_contiguous:
        return False
    size = out.shape[0]
    failed = function(
        pixels.ctypes.data, width, height, stride, *box, out.ctypes.data, size, int(mirror), int(plain)
    )
    if failed:
        raise MemoryError(f"no memory to resize {width} x {height} pixels")
    return True

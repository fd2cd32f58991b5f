"""The compiled resize against the formula in plain Python, and bit for bit against Pillow."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.transforms import decode, resize
from data_pipeline.transforms.augment import draw_augmentations

Box = tuple[float, float, float, float]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if resize.kernel() is None:
        assert not os.environ.get("CI"), "CI has a compiler, so the kernel must have been built"
        pytest.skip("the kernel was not built: no compiler")


def keys(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def axis(inputs: int, low: float, high: float, size: int) -> np.ndarray:
    """Normalised weights [size, inputs] in fixed point with 22 bits."""
    low, high = float(np.float32(low)), float(np.float32(high))
    scale = float(np.float32(high - low)) / size
    stretch = max(1.0, scale)
    out = np.zeros((size, inputs), np.int64)
    for at in range(size):
        center = low + (at + 0.5) * scale
        first = max(0, int(center - 2 * stretch + 0.5))
        last = min(inputs, int(center + 2 * stretch + 0.5))
        weights = [keys((i - center + 0.5) / stretch) for i in range(first, last)]
        for i, weight in zip(range(first, last), weights, strict=True):
            exact = weight / math.fsum(weights) * 2**22
            out[at, i] = math.floor(exact + 0.5) if exact >= 0 else -math.floor(-exact + 0.5)
    return out


def by_formula(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Reference: along rows, then along columns, each rounded to 8 bits."""
    half = 1 << 21
    across, down = axis(pixels.shape[1], box[0], box[2], size), axis(pixels.shape[0], box[1], box[3], size)
    between = np.einsum("xw,hwc->hxc", across, pixels.astype(np.int64))
    between = ((between + half) >> 22).clip(0, 255)
    out = np.einsum("yh,hxc->yxc", down, between)
    return ((out + half) >> 22).clip(0, 255).astype(np.uint8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Box, int]:
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    whole = random.integers(0, 256, (height + 3, width + 5, 3), dtype=np.uint8)
    if draw(st.booleans()):  # the largest overshoots are between black and white
        whole = np.where(whole > 127, 255, 0).astype(np.uint8)
    pixels = whole[1 : 1 + height, 2 : 2 + width]
    left, top = draw(st.floats(0, 0.8)) * width, draw(st.floats(0, 0.8)) * height
    right = left + max(0.02, draw(st.floats(0, 1)) * (width - left))
    bottom = top + max(0.02, draw(st.floats(0, 1)) * (height - top))
    box = (left, top, min(right, width), min(bottom, height))
    if draw(st.booleans()):
        box = (int(left), int(top), int(left) + 1 + int(width - left - 1), height)
    return pixels, box, draw(st.integers(1, 60))


def compiled_resize(
    pixels: np.ndarray, box: Box, size: int, mirror: bool = False, plain: bool = False
) -> np.ndarray:
    out = np.full((size, size, 3), 7, np.uint8)
    assert resize.resize(pixels, box, out, mirror, plain)
    return out


@settings(max_examples=150, deadline=None)
@given(cases())
def test_it_is_the_formula(case: tuple[np.ndarray, Box, int]) -> None:
    """Differs by at most one level, where a weight's last bit depends on the order of floating-point additions."""
    pixels, box, size = case
    want = by_formula(pixels, box, size).astype(int)
    found = compiled_resize(pixels, box, size).astype(int)
    assert abs(found - want).max() <= 1
    assert (found != want).mean() < 0.02


@settings(max_examples=300, deadline=None)
@given(cases())
def test_it_is_pillow(case: tuple[np.ndarray, Box, int]) -> None:
    """In two steps, because Pillow 13 resizes columns first where that is cheaper."""
    pixels, (left, top, right, bottom), size = case
    image = Image.fromarray(np.ascontiguousarray(pixels))
    across = image.resize((size, image.height), Image.Resampling.BICUBIC, box=(left, 0, right, image.height))
    want = across.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))
    assert (compiled_resize(*case) == np.asarray(want)).all()


@settings(max_examples=100, deadline=None)
@given(cases(), st.booleans())
def test_vectors_and_mirrors_change_no_pixel(case: tuple[np.ndarray, Box, int], mirror: bool) -> None:
    pixels, box, size = case
    plain = compiled_resize(pixels, box, size, plain=True)
    assert (compiled_resize(pixels, box, size, mirror) == (plain[:, ::-1] if mirror else plain)).all()


def test_nothing_outside_the_array_is_read_or_written() -> None:
    whole = np.zeros((40, 50, 3), np.uint8)
    whole[10:30, 10:40] = 200
    out = np.zeros((3, 16, 16, 3), np.uint8)
    assert resize.resize(whole[10:30, 10:40], (0.0, 0.0, 30.0, 20.0), out[1])
    assert (out[1] == 200).all()
    assert not out[0].any()
    assert not out[2].any()


def test_arrays_laid_out_otherwise_are_left_to_pillow() -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    assert not resize.resize(pixels[:, ::-1], (0, 0, 10, 10), np.zeros((4, 4, 3), np.uint8))
    assert not resize.resize(pixels, (0, 0, 10, 10), np.zeros((4, 8, 3), np.uint8)[:, ::2])


@pytest.mark.parametrize("train", [False, True])
def test_a_photograph_is_the_same_without_the_kernel(
    shared: Path, monkeypatch: pytest.MonkeyPatch, train: bool
) -> None:
    reader = ShardReader(open_source("photos", str(shared / "data" / "photos")))
    spec = decode.ImageSpec(96, crop=(0.5, 1.0), flip=True)
    draws = draw_augmentations(np.arange(40, dtype=np.uint64))
    for index in range(40):
        data = bytes(reader.read(0, index)[1]["jpg"])
        outs = []
        for function in (resize.resize, lambda *_: False):
            monkeypatch.setattr(decode, "resize", function)
            outs.append(np.zeros((96, 96, 3), np.uint8))
            decode.decode_image(data, spec, draws[index] if train else None, outs[-1])
        assert (outs[0] == outs[1]).all()
        assert outs[0].std() > 5

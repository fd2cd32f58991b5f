"""A batch on the device: pixels normalised by the formula, every other array with its values and bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.objectives.device_batch import to_device
from pretrain.recipe.sections.data import Image
from tests.support.rows import batch

CPU = torch.device("cpu")
ODD = Image(size=4, mean=(0.1, 0.5, 0.9), std=(0.2, 0.5, 1.5))


@pytest.mark.parametrize("image", [Image(size=4), ODD])
def test_pixels_are_normalised_channel_by_channel(image: Image) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    before = pixels.copy()
    found = to_device(batch(np.ones((3, 5)), pixels=pixels), image, CPU).images
    assert found is not None
    assert (found.dtype, found.shape) == (torch.float32, (3, 3, 4, 4))
    for channel in range(3):
        expected = (pixels[..., channel] / 255.0 - image.mean[channel]) / image.std[channel]
        np.testing.assert_allclose(found[:, channel].numpy(), expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(pixels, before)  # the batch's memory is the loader's


def test_other_arrays_keep_their_bits() -> None:
    """Keys and ids are uint64, of which torch has only the signed twin."""
    keys = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    tokens = np.array([[5, 6, 0, 0], [1, 2, 3, 2**31 - 1], [7, 0, 0, 0], [0, 0, 0, 0]])
    given = batch(
        tokens, [2, 4, 1, 0], row_keys=keys, sample_ids=keys[::-1].copy(), weights=np.float32([1, 0, 0.5, 1])
    )
    rows = to_device(given, None, CPU)
    assert rows.images is None
    assert (rows.tokens.dtype, rows.tokens.tolist()) == (torch.int64, tokens.tolist())
    assert (rows.used.dtype, rows.used.tolist()) == (torch.int64, [2, 4, 1, 0])
    assert rows.weights.tolist() == [1, 0, 0.5, 1]
    assert rows.keys.numpy().view(np.uint64).tolist() == keys.tolist()
    assert rows.sample_ids.numpy().view(np.uint64).tolist() == keys[::-1].tolist()
    assert len(rows) == 4


@pytest.mark.parametrize(("used", "longest"), [([2, 4, 1], 4), ([1, 0, 1], 2), ([3, 3, 2], 3)])
def test_the_longest_row_has_at_least_a_target(used: list[int], longest: int) -> None:
    assert to_device(batch(np.ones((3, 6)), used), None, CPU).longest == longest

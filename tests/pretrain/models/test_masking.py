"""Patch masks: the hash by bits, the number and choice of patches, and independence between rows, epochs and stages."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import hashing
from data_pipeline.order.stream_order import row_keys, stream_seed
from data_pipeline.transforms.augment import draw_augmentations
from pretrain.models.masking import hash64, keep_patches, patches_kept
from tests.support.reference import draws

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)


def signed(keys: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(keys.view(np.int64))


def masks(keys: np.ndarray, patches: int = 64, ratio: float = 0.5) -> torch.Tensor:
    """bool `[rows, patches]`, True where a patch is kept."""
    keep = keep_patches(signed(keys), patches, ratio)
    assert keep is not None
    return torch.zeros(len(keys), patches, dtype=torch.bool).scatter_(1, keep, True)


@given(KEYS, st.integers(0, 2**31), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_torch_hash_has_the_bits_of_the_numpy_hash(keys: list[int], a: int, b: int) -> None:
    unsigned = np.array(keys, np.uint64)
    expected = hashing.hash64(unsigned, a, b)
    found = hash64(signed(unsigned), a, b)
    assert found.numpy().view(np.uint64).tolist() == np.atleast_1d(expected).tolist()


@pytest.mark.parametrize(("ratio", "kept"), [(0.4, 38), (0.5, 32), (0.75, 16), (0.9, 6), (0.99, 1)])
def test_kept_patches_are_the_least_noisy_by_plain_integers(ratio: float, kept: int) -> None:
    keys = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(7)]
    found = keep_patches(signed(np.array(keys, np.uint64)), 64, ratio)
    assert found is not None
    assert patches_kept(64, ratio) == kept == found.shape[1]
    assert found.tolist() == [draws.kept_patches(key, 64, ratio) for key in keys]


@pytest.mark.parametrize("patches", [1, 4, 9, 49, 196, 256])
def test_the_number_of_patches_is_the_share_that_is_not_masked_rounded_down(patches: int) -> None:
    """A ratio of eighths has no rounding error, so the exact fraction decides."""
    for eighths in range(8):
        exact = patches * (1 - Fraction(eighths, 8))
        assert patches_kept(patches, eighths / 8) == max(1, int(exact))


def test_no_mask_keeps_everything() -> None:
    assert keep_patches(torch.arange(3), 64, 0.0) is None


def test_a_mask_depends_on_its_row_alone() -> None:
    keys = hashing.hash64(np.arange(32), 9)
    whole = masks(keys)
    for cuts in ((0, 8, 16, 32), (0, 1, 32), tuple(range(33))):
        assert torch.equal(whole, torch.cat([masks(keys[a:b]) for a, b in pairwise(cuts)]))
    turned = np.arange(32)[::-1].copy()
    assert torch.equal(whole[turned], masks(keys[turned]))


@pytest.mark.parametrize("changed", ["index", "epoch", "attempt", "shard", "source", "stage", "seed"])
def test_masks_of_keys_that_differ_in_one_part_agree_by_chance(changed: str) -> None:
    """Two masks of 32 of 64 patches share 16 on average, with the variance of draws without replacement."""
    count = 400
    place = {"shard": np.zeros(count, int), "index": np.arange(count), "epoch": np.zeros(count, int)}
    other = dict(place)
    if changed in place:
        other[changed] = place[changed] + count
    seeds = [stream_seed(*names, "pairs") for names in ((3, "masked"), (3, "masked"))]
    if changed in ("stage", "seed"):
        seeds[1] = (
            stream_seed(3, "tuned", "pairs") if changed == "stage" else stream_seed(4, "masked", "pairs")
        )
    one = masks(row_keys(seeds[0], "photos", *place.values(), 0))
    name = "scenes" if changed == "source" else "photos"
    two = masks(row_keys(seeds[1], name, *other.values(), int(changed == "attempt")))
    shared = (one & two).sum(1)
    variance = 32 * 0.5 * 0.5 * (64 - 32) / (64 - 1)  # hypergeometric
    assert shared.double().mean().item() == pytest.approx(16, abs=5 * (variance / count) ** 0.5)
    assert 0.7 < shared.double().var().item() / variance < 1.3
    assert len({tuple(row) for row in torch.cat([one, two]).tolist()}) == 2 * count


def test_every_set_of_patches_is_as_likely() -> None:
    """Of 6 patches, 3 are kept: 20 sets, chi-square with 19 degrees of freedom; and no patch is preferred."""
    count = 8000
    keys = row_keys(3, "photos", np.zeros(count, int), np.arange(count), np.zeros(count, int), 0)
    found = masks(keys, 6)
    assert (found.sum(1) == 3).all()
    sets = found.long() @ (2 ** torch.arange(6))
    counts = sets.unique(return_counts=True)[1].double()
    assert len(counts) == comb(6, 3)
    assert float(((counts - count / 20) ** 2 / (count / 20)).sum()) < 19 + 4 * 38**0.5
    kept = masks(keys, 49, 0.75).sum(0).double()
    share = patches_kept(49, 0.75) / 49
    assert float((kept - count * share).abs().max()) < 4.5 * (count * share * (1 - share)) ** 0.5


def test_the_mask_knows_nothing_of_crop_flip_and_caption() -> None:
    count = 4000
    keys = hashing.hash64(np.arange(count), 11)
    kept = masks(keys, 16).numpy()
    draws = draw_augmentations(keys)
    bits = {
        "flip": [draw.mirror for draw in draws],
        "caption": [draw.caption >> 63 for draw in draws],
        "area": [draw.crop[0][0] > 0.5 for draw in draws],
        "x": [draw.crop[0][2] >> 63 for draw in draws],
    }
    for name, values in bits.items():
        agree = (kept == np.array(values, bool)[:, None]).sum(0)
        assert abs(agree - count / 2).max() < 4.5 * (count / 4) ** 0.5, name

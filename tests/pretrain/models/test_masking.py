"""Patch masks: the torch hash against the numpy hash, sizes, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import hashing
from pretrain.models.masking import hash64, keep_patches, patches_kept
from tests.support.reference import draws

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5)


@given(KEYS, st.integers(0, 2**31), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_torch_hash_has_the_bits_of_the_numpy_hash(keys: list[int], a: int, b: int) -> None:
    unsigned = np.array(keys, np.uint64)
    expected = hashing.hash64(unsigned, a, b)
    found = hash64(torch.from_numpy(unsigned.view(np.int64)), a, b)
    assert found.numpy().view(np.uint64).tolist() == np.atleast_1d(expected).tolist()


@pytest.mark.parametrize(("ratio", "kept"), [(0.4, 38), (0.5, 32), (0.75, 16), (0.9, 6), (0.99, 1)])
def test_kept_patches_are_the_least_noisy_by_plain_integers(ratio: float, kept: int) -> None:
    keys = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(7)]
    signed = [key - 2**64 if key >= 2**63 else key for key in keys]
    found = keep_patches(torch.tensor(signed), 64, ratio)
    assert found is not None
    assert patches_kept(64, ratio) == kept == found.shape[1]
    assert found.tolist() == [draws.kept_patches(key, 64, ratio) for key in keys]


def test_a_mask_depends_on_its_row_alone() -> None:
    keys = torch.arange(32, dtype=torch.int64) << 40
    whole = keep_patches(keys, 64, 0.5)
    parts = [keep_patches(keys[start : start + 8], 64, 0.5) for start in range(0, 32, 8)]
    assert whole is not None
    assert torch.equal(whole, torch.cat([part for part in parts if part is not None]))
    assert len({tuple(row) for row in whole.tolist()}) == 32


def test_every_patch_is_kept_about_as_often() -> None:
    keys = torch.arange(4000, dtype=torch.int64)
    counts = torch.bincount(keep_patches(keys, 64, 0.5).flatten(), minlength=64)
    assert counts.float().mean() == 2000
    assert (counts - 2000).abs().max() < 5 * (4000 * 0.25) ** 0.5


def test_no_mask_keeps_everything() -> None:
    assert keep_patches(torch.arange(3), 64, 0.0) is None

"""Denominators: counted exactly, whatever their size; parts of micro-batches and ranks add up to the global mean."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from data_pipeline.batches.spec import Batch
from pretrain.losses.normalisation import count_rows, count_targets, part_of_global_mean


def batch(used: list[int], weights: list[float], start: int = 0) -> Batch:
    rows = len(used)
    return Batch(
        stream="s", step=0, start=start, stop=start + rows,
        fields={"tokens": np.zeros((rows, 4), np.int32), "used": np.array(used, np.int32)},
        weights=np.array(weights, np.float32), sample_ids=np.zeros(rows, np.uint64),
        row_keys=np.zeros(rows, np.uint64),
    )  # fmt: skip


def test_targets_are_all_tokens_but_the_first_of_rows_with_a_weight() -> None:
    assert count_targets(batch([5, 1, 0, 3, 2], [1, 1, 1, 0, 1])) == 4 + 0 + 0 + 1
    assert count_targets(batch([9, 9], [0, 0])) == 0
    assert count_targets(batch([3, 4], [0.5, 2])) == 5  # a weight is no factor


def test_rows_are_counted_by_their_place_in_the_global_batch() -> None:
    assert count_rows(batch([1, 1, 1], [1, 1, 1], start=40)) == 3


@pytest.mark.parametrize("rows", [3, 200])
def test_a_count_above_the_integers_of_fp32_and_int32_is_exact(rows: int) -> None:
    longest = 2**24 + 2
    exact = rows * (longest - 1)
    assert int(np.float32(exact)) != exact  # fp32 has only even numbers here
    assert count_targets(batch([longest] * rows, [1] * rows)) == exact


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 6), (0, 2, 4, 6), tuple(range(7))])
def test_parts_add_up_to_the_mean_over_the_global_batch(cuts: tuple[int, ...]) -> None:
    used, losses = [5, 2, 9, 1, 7, 3], torch.tensor([4.0, 1.5, 7.25, 0.0, 3.5, 2.0])
    parts = [batch(used[a:b], [1] * (b - a), a) for a, b in pairwise(cuts)]
    for count, expected in ((count_targets, 18.25 / 21), (count_rows, 18.25 / 6)):
        total = sum(count(part) for part in parts)
        found = sum(part_of_global_mean(losses[a:b].sum(), total) for a, b in pairwise(cuts))
        assert float(found) == pytest.approx(expected, rel=1e-6)

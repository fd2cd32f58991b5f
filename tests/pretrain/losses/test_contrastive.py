"""The contrastive loss and its floor against brute force in fp64, also where 16-bit arithmetic goes wrong."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses.contrastive import contrastive, repeated_caption_floor

ROWS = 12
REPEATED = [0, 1, 2, 0, 4, 5, 2, 0, 8, 9, 10, 11]


def features(rows: int, width: int, seed: int, near: Tensor | None = None) -> Tensor:
    """fp64 rows of length 1; with `near`, close to it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(noise if near is None else near + 0.03 * noise, dim=1)


def brute_force(image: Tensor, text: Tensor, scale: Tensor | float, ids: list[int]) -> Tensor:
    """The loss row by row in fp64; other rows with the same id are not negatives."""
    total = torch.zeros((), dtype=torch.float64)
    for query, keys in ((image, text), (text, image)):
        for row in range(len(ids)):
            terms = [
                scale * (query[row] * keys[other]).sum()
                for other in range(len(ids))
                if other == row or ids[other] != ids[row]
            ]
            total = total + torch.logsumexp(torch.stack(terms), 0) - scale * (query[row] * keys[row]).sum()
    return total / 2


@pytest.mark.parametrize("block", [1 << 24, 40, 12, 1])
@pytest.mark.parametrize("ids", [list(range(ROWS)), REPEATED, [7] * ROWS])
def test_value_and_gradients_are_those_of_the_formula(block: int, ids: list[int]) -> None:
    """Whole, in chunks of which the last is smaller, and row by row; the scale has a gradient too."""
    truth = [features(ROWS, 8, 1), features(ROWS, 8, 2), torch.tensor([14.3], dtype=torch.float64)]
    given = [tensor.float().requires_grad_() for tensor in truth]
    truth = [tensor.requires_grad_() for tensor in truth]
    expected = brute_force(*truth, ids)  # type: ignore[call-arg]
    expected.backward()
    found = contrastive(*given, torch.tensor(ids), block=block)
    found.backward()
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for ours, theirs in zip(given, truth, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block", [1 << 24, 40, 1])
@pytest.mark.parametrize("real", [list(range(9)), [0, 3, 4, 7, 10, 11], [5]])
def test_rows_of_weight_0_change_nothing(block: int, real: list[int]) -> None:
    """The formula over the other rows alone; dummy rows are anywhere, repeat their sample ids, and get no gradient."""
    weights = torch.zeros(ROWS)
    weights[real] = 1
    truth = [features(ROWS, 8, 1), features(ROWS, 8, 2), torch.tensor([14.3], dtype=torch.float64)]
    given = [tensor.float() for tensor in truth]
    for tensor in given[:2]:
        tensor[weights == 0] = 1e3
    given, truth = [[tensor.requires_grad_() for tensor in tensors] for tensors in (given, truth)]
    expected = brute_force(truth[0][real], truth[1][real], truth[2], [REPEATED[row] for row in real])
    expected.backward()
    found = contrastive(*given, torch.tensor(REPEATED), block=block, weights=weights)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for ours, theirs in zip(given, truth, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)
    assert all((tensor.grad[weights == 0] == 0).all() for tensor in given[:2] if tensor.grad is not None)


def test_the_floor_leaves_rows_of_weight_0_out() -> None:
    found = repeated_caption_floor(torch.tensor([0, 0, 7, 1, 0]), torch.tensor([1.0, 0, 1, 1, 1]))
    assert found.item() == pytest.approx(2 * math.log(2) / 4, rel=1e-14)


def in_halves(image: Tensor, text: Tensor, scale: float, ids: list[int]) -> Tensor:
    """What arithmetic in the features' own 16-bit type gives."""
    logits = scale * image @ text.T
    same = torch.tensor(ids)[:, None] == torch.tensor(ids)[None, :]
    logits = logits.masked_fill(same & ~torch.eye(len(ids), dtype=torch.bool), -math.inf)
    parts = [x.logsumexp(1) - x.diagonal() for x in (logits, logits.T)]
    return (parts[0].sum() + parts[1].sum()) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "close"), [(14.3, False), (100.0, False), (100.0, True)])
@pytest.mark.parametrize("block", [1 << 24, 300])
def test_16_bit_features_lose_nothing_more(dtype: torch.dtype, scale: float, close: bool, block: int) -> None:
    """The truth is the fp64 loss of the features as they are; in 16 bits the error is more than ten times larger."""
    ids = [row % 29 for row in range(32)]
    image = features(32, 64, 3, near=features(1, 64, 5) if close else None)
    text = features(32, 64, 4, near=image if close else None)
    image, text = image.to(dtype), text.to(dtype)
    expected = brute_force(image.double(), text.double(), scale, ids).item()
    found = contrastive(image, text, torch.tensor([scale]), torch.tensor(ids), block=block)
    tolerance = 2e-6 * scale  # logits of this size, rounded to fp32
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, abs=tolerance, rel=1e-6)
    worse = abs(in_halves(image, text, scale, ids).item() - expected)
    assert worse > 10 * max(tolerance, 1e-6 * expected)


def test_a_scale_of_100_overflows_nothing() -> None:
    """exp(100 * cos) overflows fp32 if the maximum is not subtracted first; the best loss is next to zero."""
    image = features(6, 4, 3).float()
    loss = contrastive(image, image, torch.tensor([100.0]), torch.arange(6))
    expected = brute_force(image.double(), image.double(), 100.0, list(range(6)))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    worst = contrastive(image, -image, torch.tensor([100.0]), torch.arange(6))
    expected = brute_force(image.double(), -image.double(), 100.0, list(range(6)))
    assert worst.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "captions", [[0, 0, 0, 1, 1, 2], [5], list(range(9)), [-(2**63), 2**63 - 1, -(2**63), -1, 0, -1, -1]]
)
def test_the_floor_is_the_mean_log_of_how_often_a_caption_occurs(captions: list[int]) -> None:
    counts = Counter(captions)
    expected = math.fsum(math.log(counts[caption]) for caption in captions) / len(captions)
    found = repeated_caption_floor(torch.tensor(captions))
    assert found.item() == pytest.approx(expected, rel=1e-14, abs=1e-300)


def test_the_floor_is_reached_by_a_perfect_model() -> None:
    """Equal captions have equal features, so no model is better than chance among them."""
    captions = torch.tensor([0, 0, 0, 1, 1, 2])
    perfect = torch.eye(3)[captions]
    best = contrastive(perfect, perfect, torch.tensor([30.0]), torch.arange(6)) / 6
    assert best.item() == pytest.approx(repeated_caption_floor(captions).item(), rel=1e-5)

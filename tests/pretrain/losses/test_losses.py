"""The losses against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.losses.contrastive import contrastive, repeated_caption_floor
from pretrain.losses.language import next_token_nll, valid_targets


def features(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def brute_force(image: torch.Tensor, text: torch.Tensor, scale: float, ids: list[int]) -> torch.Tensor:
    """The loss row by row in float64; other rows with the same id are not negatives."""
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


@pytest.mark.parametrize("block", [1 << 24, 40, 12])
@pytest.mark.parametrize("ids", [list(range(12)), [0, 1, 2, 0, 4, 5, 2, 0, 8, 9, 10, 11]])
def test_contrastive_is_the_formula_in_value_and_gradient(block: int, ids: list[int]) -> None:
    image, text = features(12, 8, 1), features(12, 8, 2)
    expected_image, expected_text = image.clone().requires_grad_(), text.clone().requires_grad_()
    scale = torch.tensor([14.3])
    expected = brute_force(expected_image, expected_text, 14.3, ids)
    expected.backward()

    given_image, given_text = image.float().requires_grad_(), text.float().requires_grad_()
    found = contrastive(given_image, given_text, scale, torch.tensor(ids), block=block)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(given_image.grad.double(), expected_image.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given_text.grad.double(), expected_text.grad, rtol=1e-4, atol=1e-5)


def test_contrastive_survives_a_large_scale() -> None:
    """exp(100 * cos) overflows fp32 if the maximum is not subtracted first."""
    image = features(6, 4, 3).float()
    loss = contrastive(image, image, torch.tensor([100.0]), torch.arange(6))
    assert torch.isfinite(loss)


def test_the_floor_is_reached_by_a_perfect_model() -> None:
    """Equal captions have equal features, so the best loss is the mean of ln(rows with that caption)."""
    captions = torch.tensor([0, 0, 0, 1, 1, 2])
    perfect = torch.eye(3)[captions]
    best = contrastive(perfect, perfect, torch.tensor([30.0]), torch.arange(6)) / 6
    expected = (3 * math.log(3) + 2 * math.log(2) + 0) / 6
    assert float(repeated_caption_floor(captions)) == pytest.approx(expected, rel=1e-12)
    assert best.item() == pytest.approx(expected, rel=1e-5)


def test_next_token_nll_counts_valid_targets_only() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 7, (3, 6), generator=torch.Generator().manual_seed(1))
    used = torch.tensor([6, 3, 1])
    found = next_token_nll(logits, tokens[:, 1:], valid_targets(used, 6))
    probabilities = logits.double().softmax(-1)
    for row in range(3):
        expected = sum(
            -math.log(probabilities[row, i, tokens[row, i + 1]]) for i in range(int(used[row]) - 1)
        )
        assert found[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)

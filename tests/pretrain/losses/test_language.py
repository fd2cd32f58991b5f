"""Next-token losses against fp64, also for 16-bit logits, large vocabularies, long rows and impossible tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.losses.language import next_token_nll, valid_targets


def random_logits(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * spread


def random_targets(rows: int, positions: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, positions), generator=torch.Generator().manual_seed(1))


def plain(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> list[float]:
    """Position by position in fp64."""
    sums = []
    for row in range(len(logits)):
        terms = [
            float(torch.logsumexp(logits[row, i].double(), 0) - logits[row, i, targets[row, i]].double())
            for i in range(logits.shape[1])
            if valid[row, i]
        ]
        sums.append(math.fsum(terms))
    return sums


@pytest.mark.parametrize("used", [[6, 3, 1, 2], [6, 6, 6, 6], [0, 1, 1, 0]])
def test_a_row_is_the_sum_over_its_valid_targets(used: list[int]) -> None:
    logits, tokens = random_logits(4, 5, 7, spread=3), random_targets(4, 6, 7)
    valid = valid_targets(torch.tensor(used), 6)
    assert valid.sum(1).tolist() == [max(0, n - 1) for n in used]
    assert valid.tolist() == [[position + 1 < n for position in range(5)] for n in used]
    found = next_token_nll(logits, tokens[:, 1:], valid)
    assert found.tolist() == pytest.approx(plain(logits, tokens[:, 1:], valid), rel=1e-6, abs=1e-9)


def test_the_gradient_is_softmax_minus_the_target_at_valid_positions() -> None:
    logits, targets = random_logits(2, 4, 9, spread=2).requires_grad_(), random_targets(2, 4, 9)
    valid = torch.tensor([[True, True, False, True], [False, False, False, False]])
    (next_token_nll(logits, targets, valid) * torch.tensor([2.0, 3.0])).sum().backward()
    expected = logits.detach().double().softmax(-1) - F.one_hot(targets, 9)
    expected = expected * valid[:, :, None] * torch.tensor([2.0, 3.0])[:, None, None]
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("positions", "vocabulary", "spread"), [(4, 32_000, 1.0), (2000, 16, 0.5), (50, 500, 30.0)]
)
def test_16_bit_logits_lose_nothing_more(
    dtype: torch.dtype, positions: int, vocabulary: int, spread: float
) -> None:
    """A large vocabulary, a long row, large logits: in 16 bits the error is more than ten times larger."""
    logits = random_logits(1, positions, vocabulary, spread=spread).to(dtype)
    targets, valid = random_targets(1, positions, vocabulary), torch.ones(1, positions, dtype=torch.bool)
    (expected,) = plain(logits, targets, valid)
    found = next_token_nll(logits, targets, valid)
    assert (found.dtype, found.shape) == (torch.float32, (1,))
    assert found.item() == pytest.approx(expected, rel=2e-6)
    halves = F.cross_entropy(logits[0], targets[0], reduction="none").sum()
    assert halves.dtype == dtype
    assert abs(halves.item() - expected) > 10 * 2e-6 * expected


def test_large_and_impossible_logits() -> None:
    """Tokens of probability 0, logits of 1e4 and of one value: nothing overflows, nothing is nan."""
    logits = torch.zeros(1, 4, 5)
    logits[0, 0] = torch.tensor([1e4, 0.0, -1e4, 1e4, 3.0])
    logits[0, 1] = torch.tensor([-math.inf, 1.0, 2.0, -math.inf, -math.inf])
    logits[0, 2] = -3e4
    logits[0, 3] = torch.tensor([math.nan, 0, 0, 0, 0])  # at padding
    valid = torch.tensor([[True, True, True, False]])
    found = next_token_nll(logits, torch.tensor([[3, 1, 4, 0]]), valid)
    assert found.item() == pytest.approx(math.log(2) + math.log(1 + math.e) + math.log(5), rel=1e-6)

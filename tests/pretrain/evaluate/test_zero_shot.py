"""Class weights of zero-shot classification: the formula in fp64, whatever the type of the features, and any prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.evaluate.zero_shot import classifier
from pretrain.recipe.sections.evaluation import ZeroShot
from tests.support.tiny_models import Words

CPU = torch.device("cpu")


class Letters(Words):
    """One token per letter, so that a prompt can be read back from its row."""

    start_id, end_id, pad_id = 0xE000, 0xE001, 0xE002

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def feature(row: Tensor) -> np.ndarray:
    """A vector of length 1 that depends on the whole prompt."""
    vector = np.random.default_rng([int(n) for n in row]).normal(size=64)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(dtype: torch.dtype) -> None:
    """With bf16 features the mean of 50 prompts keeps fp32; a mean in bf16 is more than ten times further away."""
    task = ZeroShot(path="x", classes={"a": "cat", "b": "dog"}, templates=[f"{n} {{}}" for n in range(50)])
    rows: list[Tensor] = []

    def forward(tokens: Tensor) -> dict[str, Tensor]:
        rows.append(tokens)
        return {"text": torch.from_numpy(np.stack([feature(row) for row in tokens])).to(dtype)}

    found = classifier(forward, task, Letters(), 12, CPU)
    assert found.dtype == torch.float32
    for weights, tokens in zip(found, rows, strict=True):
        features = torch.from_numpy(np.stack([feature(row) for row in tokens])).to(dtype)
        expected = features.double().numpy().mean(0)
        expected /= np.linalg.norm(expected)
        error = np.abs(weights.double().numpy() - expected).max()
        assert error < 1e-6
        if dtype == torch.bfloat16:
            halves = F.normalize(features.mean(dim=0), dim=0).double().numpy()
            assert np.abs(halves - expected).max() > 1e-5


def test_a_prompt_is_its_template_with_every_pair_of_braces_replaced() -> None:
    """Other braces, in a template or in a class's name, are text like any other."""
    templates = ["a {} here", "{} and {}", "{0} {x} {", "none"]
    task = ZeroShot(path="x", classes={"a": "{cat}", "b": "{}"}, templates=templates)
    seen: list[str] = []

    def forward(tokens: Tensor) -> dict[str, Tensor]:
        for row in tokens.tolist():
            assert (row[0], row.count(Letters.end_id)) == (Letters.start_id, 1)
            seen.append("".join(map(chr, row[1 : row.index(Letters.end_id)])))
        return {"text": torch.eye(len(tokens))}

    classifier(forward, task, Letters(), 30, CPU)
    assert seen == [
        "a {cat} here",
        "{cat} and {cat}",
        "{0} {x} {",
        "none",
        "a {} here",
        "{} and {}",
        "{0} {x} {",
        "none",
    ]

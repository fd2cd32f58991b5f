"""DeepSpeed problems that pretrain/distributed/engine.py works around: a test fails when DeepSpeed fixes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def found(ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = ranks("tests.dist.quirk_ranks", [], 2, tmp_path_factory.mktemp("quirks"))
    (line,) = [line for line in output.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_two_backwards_under_zero_3_add_a_stale_gradient(found: dict[str, Any]) -> None:
    """The usual loop is exact on stages 0 to 2 and silently wrong on 3. If this fails, DeepSpeed has fixed it."""
    naive = found["naive"]
    assert all(naive[zero] < 1e-6 for zero in ("0", "1", "2")), naive
    assert naive["3"] > 1e-4, naive


def test_coalescing_is_exact_on_every_stage_that_has_it(found: dict[str, Any]) -> None:
    assert all(error < 1e-6 for error in found["coalesced"].values()), found["coalesced"]


def test_a_scalar_parameter_cannot_be_broadcast(found: dict[str, Any]) -> None:
    """The reason that logit_scale has shape [1] during training."""
    assert "dim() cannot be 0" in found["scalar_error"]

"""The compiled pass over bf16 against numpy's many: the same bits, whatever the numbers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pretrain.merge import fused, merge
from tests.pretrain.merge.build import write_bf16


@pytest.fixture(autouse=True)
def compiled() -> None:
    if fused.kernel() is None:
        assert not os.environ.get("CI"), "CI has a compiler, so the kernel must have been built"
        pytest.skip("the kernel was not built: no compiler")


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    "weights", [[0.4, 0.6], [1.7, -0.7], [0.2, 0.3, 0.5], [1e-30, 1.0], [3e38, -2e38, 1.0]]
)
def test_every_pattern_merges_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[float]
) -> None:
    """All 65,536 numbers, NaN and infinities and subnormals among them, against all in another order."""
    random = np.random.default_rng(0)
    every = np.arange(1 << 16, dtype=np.uint16)
    inputs = []
    for number in range(len(weights)):
        order = random.permutation(every)
        inputs.append(str(write_bf16(tmp_path / f"in{number}", {"w": bf16(order), "odd": bf16(order[:777])})))
    calls, linear = [], fused.linear

    def counted(*given: object) -> bool:
        calls.append(linear(*given))  # type: ignore[arg-type]
        return calls[-1]

    monkeypatch.setattr(fused, "linear", counted)
    merge(inputs, tmp_path / "fused", weights=weights)
    assert calls
    assert all(calls)
    monkeypatch.setattr(fused, "linear", lambda *_: False)
    merge(inputs, tmp_path / "numpy", weights=weights)
    one, other = (tmp_path / name / "model.safetensors" for name in ("fused", "numpy"))
    assert one.read_bytes() == other.read_bytes()

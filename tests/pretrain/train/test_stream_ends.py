"""A stream that ends before the training is an error before the first step; a source that ends is announced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.order.stream_order import SourceCounts, StreamOrder
from pretrain.recipe.lengths import check_ends
from tests.support import rank, tiny


def order(**max_epochs: float | None) -> StreamOrder:
    """Sources of 16 samples each, in batches of 8."""
    counts = np.array([10, 6])
    sources = [SourceCounts(name, counts, max_epochs=passes) for name, passes in max_epochs.items()]
    return StreamOrder(sources, batch=8, lanes=None, seed=1)


def test_a_stream_may_end_with_the_training_and_not_before() -> None:
    two_passes = {"pairs": order(a=2.0), "text": order(b=None)}
    assert check_ends(two_passes, 4) == []
    with pytest.raises(
        UserError, match=r"data\.pairs\.sources: .* after 4 steps, but the training takes 5; .*steps=4"
    ):
        check_ends(two_passes, 5)


def test_a_source_that_ends_earlier_is_announced() -> None:
    mixed = {"pairs": order(a=1.0, b=None)}
    assert check_ends(mixed, 4) == []  # each of the two gets half of the rows
    (line,) = check_ends(mixed, 100)
    assert line.startswith("data.pairs.sources.a: reaches its max_epochs after 4 of 100 steps")


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_rank_refuses_before_anything_is_written(tmp_path: Path) -> None:
    tiny.make_data(tmp_path)
    data = tiny.pairs_stream(tmp_path)
    data["sources"] = {"pairs": {"path": str(tmp_path / "pairs"), "max_epochs": 1}}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.flip_recipe(tmp_path, data={"pairs": data}))
    code, printed = rank.run(recipe)
    assert code == 2, printed
    assert "data.pairs.sources: all sources reach their max_epochs after 6 steps" in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert not list(tmp_path.rglob("resolved.yaml"))

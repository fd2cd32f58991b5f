"""One recipe on real data: CIFAR-10 and photographs; only the source changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.loader.loader import LocalLoader
from data_pipeline.order.digest import hex16
from pretrain.build.streams import stage_specs
from pretrain.recipe.load import load_recipe
from pretrain.run import metrics_log
from tests.support import rank

RECIPE = Path(__file__).resolve().parents[2] / "configs/flip/small.yaml"
STEPS = 3


@pytest.mark.dist
@pytest.mark.parametrize("data", ["cifar10/train", "photos"])
def test_only_the_source_changes(shared: Path, tmp_path: Path, data: str) -> None:
    """The digests of the run equal those of a loader alone, and no image is replaced."""
    changes = [
        f"data.pairs.sources.images.path={shared / 'data' / data}",
        "data.pairs.batch=16",
        f"train.steps={STEPS}",
        f"run.dir={tmp_path / 'run'}",
    ]
    code, printed = rank.run(RECIPE, *changes, logs=tmp_path)
    assert code == 0, printed
    logged = metrics_log.read(tmp_path / "run" / "main" / "metrics.jsonl")
    recipe = load_recipe(RECIPE, changes)
    with LocalLoader(
        stage_specs(recipe.stages["main"], recipe.run.seed, "main", ("pairs",)), 0, 1, 0
    ) as loader:
        want = [hex16(step["pairs"][0].batch_digest) for step in loader.steps(0, STEPS)]
    assert [row["batch_digest"] for row in logged] == want
    assert len(set(want)) == STEPS
    assert not any(row["skipped"] for row in logged)

"""One recipe on real data: CIFAR-10 and photographs; only the source changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.loader.loader import LocalLoader
from data_pipeline.order.digest import hex16
from pretrain.build.streams import stage_specs
from pretrain.recipe.load import load_recipe
from pretrain.run import metrics_log

RECIPE = str(Path(__file__).resolve().parents[2] / "configs/flip/small.yaml")
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
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "run", RECIPE, *changes],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    logged = metrics_log.read(tmp_path / "run" / "main" / "metrics.jsonl")
    recipe = load_recipe(RECIPE, changes)
    with LocalLoader(
        stage_specs(recipe.stages["main"], recipe.run.seed, "main", ("pairs",)), 0, 1, 0
    ) as loader:
        want = [hex16(step["pairs"][0].batch_digest) for step in loader.steps(0, STEPS)]
    assert [row["batch_digest"] for row in logged] == want
    assert len(set(want)) == STEPS
    assert not any(row["skipped"] for row in logged)

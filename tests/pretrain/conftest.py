"""A FLIP run and a SPHINX run of three steps, trained once per session for all tests that read weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny

TRAIN = "import sys; from pretrain.train.main import main; sys.exit(main(sys.argv[1], 'main', sys.argv[2:]))"


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and `runs/{flip,sphinx}/main`, three steps each."""
    root = tmp_path_factory.mktemp("runs")
    tiny.make_data(root)
    for name, recipe in (("flip", tiny.flip_recipe(root)), ("sphinx", tiny.sphinx_recipe(root))):
        path = tiny.write_recipe(root / f"{name}.yaml", recipe | {"train": {"steps": 3}})
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return root

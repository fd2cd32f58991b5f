"""A FLIP run and a SPHINX run of three steps, trained once per session for all tests that read weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import rank, tiny


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and `runs/{flip,sphinx}/main`, three steps each."""
    root = tmp_path_factory.mktemp("runs")
    tiny.make_data(root)
    for name, recipe in (("flip", tiny.flip_recipe(root)), ("sphinx", tiny.sphinx_recipe(root))):
        path = tiny.write_recipe(root / f"{name}.yaml", recipe | {"train": {"steps": 3}})
        code, printed = rank.run(path)
        assert code == 0, printed[-3000:]
    return root

"""`dromos data simulate`: the load of a recipe as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from launch.cli.data import app
from launch.cli.data_reports import loads_of, size
from tests.support.launching import write_recipe
from tests.support.tiny import write_pairs


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tars").mkdir()
    write_pairs(tmp_path / "tars")
    return str(write_recipe(tmp_path))


def simulate(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_words_and_json_tell_the_same(recipe: str) -> None:
    limit, loads = loads_of(recipe, "masked", 2)
    assert limit == 100e9
    given = (recipe, "--stage", "masked", "--nodes", "2", "--bandwidth", "8", "--samples-per-second", "1e12")
    told = json.loads(simulate(*given, "--json"))
    assert told["bytes_a_second"] == 1e9
    assert list(told["streams"]) == [load.name for load in loads]
    words = simulate(*given)
    for load in loads:
        figures = told["streams"][load.name]
        assert figures["node_bytes"] == load.node_bytes
        assert figures["gets_a_sample"] == load.gets_per_sample
        assert figures["first_window_seconds"] == load.cache_bytes / 1e9
        assert figures["most_samples_a_second"] == load.max_samples_per_second(1e9) < 1e12
        assert figures["sustained"] is False
        assert f"{load.name}: {load.batch} rows per step" in words
        assert f"{load.gets_per_sample:.4f} GETs per sample" in words
        assert "less than the target of 1,000,000,000,000" in words
        assert all(source.name in words for source in load.sources)


def test_what_cannot_be_simulated_is_said(recipe: str) -> None:
    with pytest.raises(UserError, match="nowhere is not a training stage; write --stage with one of"):
        loads_of(recipe, "nowhere", 1)


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1500, 2.5e6, 7e9, 3.2e12, 5e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "7.0 GB",
        "3.2 TB",
        "5,000.0 TB",
    ]

"""A note if both inputs have recorded ancestors and share none; no note in every other case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.merge import merge, open_weights, plan
from pretrain.merge.planning.lineage import ancestors
from tests.support.merge_inputs import floats, write
from tests.support.zero_runs import finish, recipe, training

pytest.importorskip("torch")


def stage(run: Path, name: str, init: str | None = None) -> str:
    made = training().model_copy(update={"init": init})
    folder = finish(recipe(run, **{name: made}), name, run, {"w": floats(len(name), 4)})
    return str(folder)


def notes(*inputs: str) -> list[str]:
    return [note for note in plan(list(inputs), beta=0.5).notes if "ancestor" in note]


def test_a_stage_and_its_descendant(tmp_path: Path) -> None:
    real = stage(tmp_path / "run", "real")
    synthetic = stage(tmp_path / "run", "synthetic", "real")
    assert notes(real, synthetic) == []
    assert notes(synthetic, real) == []


def test_siblings_through_another_run_and_a_step(tmp_path: Path) -> None:
    stage(tmp_path / "first", "lm")
    one = stage(tmp_path / "second", "one", "first/lm@1")
    two = stage(tmp_path / "second", "two", str(tmp_path / "first/lm"))
    assert notes(one, two) == []


def test_siblings_of_a_model_of_the_hub(tmp_path: Path) -> None:
    one = stage(tmp_path / "a", "one", "hf://org/base")
    two = stage(tmp_path / "b", "two", "hf://org/base@main")
    assert notes(one, two) == []


def test_strangers(tmp_path: Path) -> None:
    one, two = stage(tmp_path / "a", "one"), stage(tmp_path / "b", "two", "hf://org/base")
    (note,) = notes(one, two)
    assert "share no ancestor" in note
    assert "hf://org/base" in note


def test_who_says_nothing_is_no_stranger(tmp_path: Path) -> None:
    bare = str(write(tmp_path / "bare", {"w": floats(3, 4)}))
    assert notes(stage(tmp_path / "a", "one"), bare) == []


def test_a_merge_descends_from_its_inputs(tmp_path: Path) -> None:
    one, two = stage(tmp_path / "a", "one"), stage(tmp_path / "b", "two")
    merge([one, two], tmp_path / "mix", beta=0.5)
    assert notes(str(tmp_path / "mix"), one) == []
    assert len(notes(str(tmp_path / "mix"), stage(tmp_path / "c", "three"))) == 1


@pytest.mark.parametrize("record", [{"inputs": "damaged"}, {"inputs": 3}, {"inputs": [3]}, {}])
def test_a_record_that_says_nothing(tmp_path: Path, record: dict[str, object]) -> None:
    folder = write(tmp_path / "mix", {"w": floats(0, 4)})
    (folder / "merge.json").write_text(json.dumps(record))
    assert notes(str(folder), stage(tmp_path / "a", "one")) == []


def test_no_record_tells_where_somebodys_folders_lie(tmp_path: Path) -> None:
    source = open_weights(stage(tmp_path / "secret" / "run", "lm"))
    found = ancestors(source)
    assert found
    assert not any("secret" in one for one in found)

"""Resume compatibility: changed identity keys are refused with both values, free keys pass, lengths may grow."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import MergeStage, Recipe
from pretrain.run.identity import (
    check_run_folder,
    compare_changeable_keys,
    compare_identity,
    compare_versions,
)
from tests.pretrain.recipe.test_recipe import FLIP, write


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder, FLIP), overrides, runnable=False)


def record(folder: Path, *overrides: str, stage: str = "masked") -> dict[str, Any]:
    return stage_record(recipe(folder, *overrides), stage)


def begin(run: Path, loaded: Recipe, stage: str = "masked", checkpoint: dict[str, Any] | None = None) -> None:
    """Write the folder of a stage that has started."""
    (run / stage).mkdir(parents=True)
    (run / stage / "resolved.yaml").write_text(dump_plain(stage_record(loaded, stage)))
    if checkpoint is not None:
        folder = run / stage / "checkpoints" / "step_00000005"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(checkpoint))
        (folder / "COMPLETE").write_text("")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.seed=4", "run.seed"),
        ("data.pairs.batch=32", "data.pairs.batch"),
        ("data.pairs.image.crop=[1, 1]", "data.pairs.image.crop.0"),
        ("data.pairs.image.max_pixels=50M", "data.pairs.image.max_pixels"),
        ("data.pairs.sources.digits=elsewhere", "data.pairs.sources.digits.path"),
        ("data.pairs.sources.scenes.weight=0.25", "data.pairs.sources.scenes.weight"),
        ("model.text.width=32", "model.text.width"),
        ("model.vision.layers=4", "model.vision.0.layers"),
        ("objective.image_mask=0.75", "objective.image_mask"),
        ("optimizer.lr=2e-3", "optimizer.lr"),
        ("optimizer.betas=[0.9, 0.999]", "optimizer.betas.1"),
        ("schedule.warmup=11", "schedule.warmup"),
        ("engine.dtype=bf16", "engine.dtype"),
        ("masked.init=./weights", "init"),
    ],
)
def test_an_identity_key_must_match(override: str, key: str, tmp_path: Path) -> None:
    differences = compare_identity(record(tmp_path), record(tmp_path, override))
    assert [line.split(": ")[0] for line in differences] == [key]


def test_a_folder_older_than_a_key_had_its_default(tmp_path: Path) -> None:
    before = record(tmp_path)
    del before["stage"]["data"]["pairs"]["image"]["max_pixels"]
    assert compare_identity(before, record(tmp_path)) == []
    (line,) = compare_identity(before, record(tmp_path, "data.pairs.image.max_pixels=50M"))
    assert line == "data.pairs.image.max_pixels: (absent) -> 50000000"


@pytest.mark.parametrize(
    "override",
    [
        "loader.workers=0",
        "loader.backend=ray",
        "train.micro_batch=64",
        "train.hours=1",
        "checkpoint.every=7",
        "checkpoint.keep=1",
        "eval.every=3",
        "engine.deterministic=true",
        "engine.zero=3",
        "run.name=other",
        "run.dir=elsewhere",
    ],
)
def test_a_free_key_may_change(override: str, tmp_path: Path) -> None:
    old, new = record(tmp_path), record(tmp_path, override)
    assert compare_identity(old, new) == []
    if not override.startswith("run."):
        assert [line.split(": ")[0] for line in compare_changeable_keys(old, new)] == [override.split("=")[0]]


def test_a_changed_decoder_version_is_named_but_not_refused(tmp_path: Path) -> None:
    old, new = (
        record(tmp_path) | {"versions": {"pillow": v, "simplejpeg": "1.9.0"}} for v in ("12.0", "13.0")
    )
    assert compare_identity(old, new) == compare_changeable_keys(old, new) == []
    (line,) = compare_versions(old, new)
    assert line.startswith('versions.pillow: "12.0" -> "13.0": images may decode')
    assert compare_versions(new, new) == []
    assert compare_versions(record(tmp_path), new) == []  # a run from before versions were recorded
    del new["versions"]["simplejpeg"]
    assert len(compare_versions(old, new)) == 2


@pytest.mark.parametrize(
    ("old", "new", "fine"),
    [
        ("train.steps=100", "train.steps=101", True),
        ("train.steps=100", "train.steps=99", False),
        ("train.steps=100", "train.samples=6400", True),  # a batch is 64
        ("train.steps=100", "train.samples=6336", False),
        ("train.epochs=1", "train.epochs=1.5", True),
        ("train.epochs=1", "train.epochs=0.5", False),
        ("train.epochs=1", "train.steps=1000", False),
    ],
)
def test_a_length_may_grow(old: str, new: str, fine: bool, tmp_path: Path) -> None:
    differences = compare_identity(record(tmp_path, old), record(tmp_path, new))
    assert (differences == []) is fine
    assert all(line.startswith("train: ") for line in differences)


def test_accept_change_frees_the_data_and_nothing_else(tmp_path: Path) -> None:
    old = record(tmp_path)
    accept = "run.accept_change=true"
    changes = [["data.pairs.sources.digits=elsewhere"], ["data.pairs.batch=32"], ["data.pairs.share_by=sqrt"]]
    for change in changes:
        new = record(tmp_path, accept, *change)
        assert compare_identity(old, new) == []
        (line,) = compare_changeable_keys(old, new)  # shown in the log of the run
        assert line.startswith(change[0].split("=")[0])
        assert compare_identity(old, record(tmp_path, *change)) == [line]
    assert compare_identity(old, record(tmp_path, accept, "optimizer.lr=1")) != []
    assert compare_identity(old, record(tmp_path, accept, "run.seed=8")) != []


def test_a_refusal_names_accept_change_where_only_the_data_differs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, recipe(tmp_path))
    changed = "data.pairs.batch=32"
    with pytest.raises(UserError, match=r"run\.accept_change=true"):
        check_run_folder(run, recipe(tmp_path, changed), "masked")
    check_run_folder(run, recipe(tmp_path, changed, "run.accept_change=true"), "masked")
    with pytest.raises(UserError) as caught:
        check_run_folder(run, recipe(tmp_path, changed, "objective.image_mask=0.75"), "masked")
    assert "accept_change" not in str(caught.value)


def test_an_absent_folder_passes(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "absent", recipe(tmp_path), "masked", 2)
    assert not (tmp_path / "absent").exists()


def test_a_folder_of_another_recipe_shows_the_difference_and_stays_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, recipe(tmp_path))
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    check_run_folder(run, recipe(tmp_path), "masked", 2)
    with pytest.raises(UserError) as caught:
        check_run_folder(run, recipe(tmp_path, "run.seed=4", "objective.image_mask=0.75"), "masked", 2)
    message = str(caught.value)
    for words in (str(run / "masked"), "run.seed: 3 -> 4", "objective.image_mask: 0.5 -> 0.75", "run.dir"):
        assert words in message
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_a_new_stage_beside_another_run_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, recipe(tmp_path))
    check_run_folder(run, recipe(tmp_path), "tuned")
    for override, words in (("run.name=other", "run.name"), ("run.seed=4", "run.seed")):
        with pytest.raises(UserError, match=words):
            check_run_folder(run, recipe(tmp_path, override), "tuned")


def test_world_size_and_zero_stage_must_match_a_checkpoint(tmp_path: Path) -> None:
    loaded, other = recipe(tmp_path), recipe(tmp_path, "engine.zero=3")
    fresh = tmp_path / "fresh"
    begin(fresh, loaded)
    check_run_folder(fresh, other, "masked", 4)
    saved = tmp_path / "saved"
    begin(saved, loaded, checkpoint={"world_size": 2})
    check_run_folder(saved, loaded, "masked", 2)
    with pytest.raises(UserError, match=r"saved by 2 ranks; resuming with 4 is not available yet"):
        check_run_folder(saved, loaded, "masked", 4)
    with pytest.raises(UserError, match=r"engine\.zero=1; changing it to 3 on resume is not available yet"):
        check_run_folder(saved, other, "masked", 2)


@pytest.mark.parametrize("content", ["{", "", None])
def test_a_checkpoint_that_does_not_say_its_ranks_is_left_to_the_loader(
    tmp_path: Path, content: str | None
) -> None:
    loaded = recipe(tmp_path)
    begin(tmp_path / "saved", loaded, checkpoint={"world_size": 2})
    (state,) = (tmp_path / "saved").rglob("state.json")
    state.unlink()
    if content is not None:
        state.write_text(content)
    check_run_folder(tmp_path / "saved", loaded, "masked", 4)


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, recipe(tmp_path))
    for content in ("stage: [", "nothing", "stage: 5"):
        (run / "masked" / "resolved.yaml").write_text(content)
        with pytest.raises(UserError, match=r"resolved\.yaml.*delete"):
            check_run_folder(run, recipe(tmp_path), "masked")


# Keys of a stage that may change between two calls of one run; every other key is compared.
FREE = ("init_allow", "train", "loader", "checkpoint", "eval", "engine.zero", "engine.deterministic", "engine.offload",
        "engine.activation_checkpointing", "engine.compile")  # fmt: skip


def leaves(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values that are no map."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*at, key))
    else:
        yield at


def changed(record: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(record)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copied


@pytest.mark.parametrize("kind", ["train", "merge"])
def test_every_key_of_a_stage_is_compared_or_known_to_be_free(kind: str, tmp_path: Path) -> None:
    """All values of a whole record, one at a time: changed, removed, and absent before."""
    whole = record(tmp_path)
    if kind == "merge":
        stage = MergeStage(kind="merge", inputs={"a": 1.0, "b": 2.0}, only="w", copy_rest="a")
        whole["stage"] = stage.model_dump(mode="json", by_alias=True, exclude_none=True)
    sections = set(
        type(recipe(tmp_path).stages["masked"]).model_fields if kind == "train" else MergeStage.model_fields
    )
    whole["stage"] |= {"init": "x"} if kind == "train" else {}
    paths = list(leaves(whole["stage"], ("stage",)))
    if kind == "train":
        paths += [("stage", "continue"), ("stage", "init_allow")]
        assert len(paths) > 50
    assert {path[1] for path in paths} == {name.rstrip("_") for name in sections}
    for path in paths:
        name = ".".join(path[1:])
        is_free = any(name == free or name.startswith(f"{free}.") for free in FREE)
        new = changed(whole, path, ["another"])
        if path[1] != "train":
            assert bool(compare_identity(whole, new)) is not is_free, name
            assert bool(compare_identity(new, whole)) is not is_free, name
            assert bool(compare_changeable_keys(whole, new)) is is_free, name
        without = changed(whole, path, None)
        assert bool(compare_identity(whole, without)) is (not is_free and path[-1] != "continue"), name
    for key, is_compared in (("seed", True), ("name", False), ("dir", False)):
        assert bool(compare_identity(whole, changed(whole, ("run", key), "another"))) is is_compared

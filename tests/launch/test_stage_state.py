"""Which stages of a job are done and which remain, from the files of a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.job import StageJob
from launch.stage_state import is_done, stage_job, stage_states
from pretrain import merge_stage
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from tests.support.launching import write_recipe


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def with_length(path: Path, length: str, batch: int = 8) -> Recipe:
    """The recipe with another length of its stage `masked`, in batches of 8."""
    return load_recipe(path, [f"masked.train.{length}", f"data.pairs.batch={batch}"])


def finish(recipe: Recipe, folder: Path, name: str, result: str) -> None:
    """What a training stage leaves when it ends: its part of the recipe, and the last step."""
    stage = folder / name
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "resolved.yaml").write_text(dump_plain(stage_record(recipe, name)))
    (stage / "result.json").write_text(result)


@pytest.mark.parametrize(
    ("ran", "step", "now", "batch", "done"),
    [
        ("steps=20", 20, "steps=20", 8, True),
        ("steps=20", 20, "steps=21", 8, False),
        ("steps=20", 20, "steps=19", 8, True),
        ("samples=160", 20, "steps=20", 8, True),
        ("samples=160", 20, "samples=161", 8, False),
        (
            "samples=160",
            20,
            "samples=160",
            4,
            True,
        ),  # 40 steps of the present batch, but the samples were served
        ("samples=160", 20, "samples=168", 4, False),
        ("epochs=2", 2, "epochs=2", 8, True),  # only the data tells how many steps these are
        ("epochs=2", 2, "epochs=3", 8, False),
    ],
)
def test_a_training_stage_is_done_when_it_reached_the_length_that_is_asked_now(
    path: Path, ran: str, step: int, now: str, batch: int, done: bool
) -> None:
    finish(with_length(path, ran), path.parent / "run", "masked", f'{{"step": {step}}}')
    recipe = with_length(path, now, batch)
    assert is_done(path.parent / "run", stage_job(recipe, "masked"), recipe) is done


def test_a_stage_without_a_whole_result_is_not_done(path: Path) -> None:
    recipe, folder = load_recipe(path), path.parent / "run"
    job = stage_job(recipe, "masked")
    assert not is_done(folder, job, recipe)
    folder.mkdir()
    (folder / "masked").write_text("a file of the user's in place of the folder")
    assert not is_done(folder, job, recipe)
    (folder / "masked").unlink()
    finish(recipe, folder, "masked", '{"step": 19}')
    (folder / "masked/resolved.yaml").unlink()
    assert not is_done(folder, job, recipe)
    (folder / "masked/result.json").write_text("{}")
    assert not is_done(folder, job, recipe)
    in_epochs = with_length(path, "epochs=2")
    for no_result in ("{}", '{"step": null}'):
        finish(in_epochs, folder, "masked", no_result)
        assert not is_done(folder, stage_job(in_epochs, "masked"), in_epochs)
    (folder / "masked/result.json").write_text("[]")
    with pytest.raises(UserError, match=r"run/masked/result\.json is damaged: it holds a list"):
        is_done(folder, job, recipe)
    (folder / "masked/result.json").write_text('{"step": 2')
    with pytest.raises(
        UserError, match=r"run/masked/result\.json is not valid JSON; delete it to run the stage"
    ):
        is_done(folder, job, recipe)


def test_what_a_launcher_needs_of_a_stage(path: Path) -> None:
    path.write_text(
        path.read_text().replace("  tuned: {", "  tuned: {loader: {backend: ray}, ")
        + "  mix: {kind: merge, inputs: {masked: 0.4, tuned: 0.6}}\n"
    )
    assert stage_job(load_recipe(path), "masked") == StageJob("masked", "train", 20, "local")
    assert stage_job(load_recipe(path), "tuned") == StageJob("tuned", "train", 10, "ray")
    assert stage_job(load_recipe(path), "mix") == StageJob("mix", "merge")
    assert stage_job(with_length(path, "samples=81"), "masked").steps == 11  # of 8 rows
    assert stage_job(with_length(path, "epochs=2"), "masked").steps is None


def states(path: Path, merges: str, missing: str, finished: bool = True) -> tuple[set[str], list[str]]:
    """Stages that are done and that remain, when `missing` has not run and the merges that `merges` adds have."""
    folder = path.parent / "run"
    path.write_text(path.read_text() + merges)
    recipe = load_recipe(path)
    for name in recipe.stages:
        if name != missing:
            finish(recipe, folder, name, '{"step": 20}')
    found = stage_states(recipe, [stage_job(recipe, name) for name in recipe.stages], folder)
    return set(found.done), [stage.name for stage in found.remaining]


@pytest.mark.parametrize(
    ("address", "reads"),
    [
        ("tuned", True),
        ("tuned@latest", True),
        ("tuned@5", True),
        ("run/tuned", True),  # a run's name, looked up beside this run's folder, or a path
        ("run/tuned@10", True),
        ("./run/tuned", True),
        ("run/../run/tuned@best", True),
        ("FOLDER/run/tuned", True),
        ("FOLDER/link/tuned", True),
        ("masked", False),
        ("other/tuned", False),
        ("./tuned", False),
        ("FOLDER/tuned", False),
        ("run/tuned/deeper", False),
        ("s3://run/tuned", False),
        ("hf://run/tuned@main", False),
    ],
)
def test_a_merge_runs_again_if_it_reads_a_stage_that_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, address: str, reads: bool
) -> None:
    """`tuned` remains; the merge of the address and `masked` is finished, and was made from the old `tuned`."""
    monkeypatch.setattr(merge_stage, "is_finished", lambda stage, folder: True)
    (path.parent / "link").symlink_to(path.parent / "run")
    address = address.replace("FOLDER", str(path.parent))
    other = "masked@3" if address == "masked" else "masked"
    done, remaining = states(
        path, f"  mix: {{kind: merge, inputs: {{'{address}': 0.4, {other}: 0.6}}}}\n", "tuned"
    )
    assert done == {"masked", "mix"}
    assert remaining == ["tuned", *["mix"] * reads]


@pytest.mark.parametrize(
    ("address", "reads"), [("run/tuned", True), ("run/masked@2", False), ("tuned", True)]
)
def test_a_run_is_also_looked_up_beside_the_run_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch, address: str, reads: bool
) -> None:
    """From any working directory."""
    monkeypatch.setattr(merge_stage, "is_finished", lambda stage, folder: True)
    (path.parent / "elsewhere").mkdir()
    monkeypatch.chdir(path.parent / "elsewhere")
    _, remaining = states(path, f"  mix: {{kind: merge, inputs: {{{address}: 0.4, masked: 0.6}}}}\n", "tuned")
    assert remaining == ["tuned", *["mix"] * reads]


def test_merges_of_merges_and_the_rest_of_a_merge_are_followed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Path]] = []

    def is_finished(stage: object, folder: Path) -> bool:
        asked.append((folder.name, folder.parent))
        return folder.name != "open"

    monkeypatch.setattr(merge_stage, "is_finished", is_finished)
    merges = """
  first: {kind: merge, inputs: {masked: 0.4, tuned: 0.6}}
  second: {kind: merge, inputs: {first: 0.5, './elsewhere': 0.5}}
  rest: {kind: merge, inputs: {masked: 0.4, masked@2: 0.6}, copy_rest: tuned}
  apart: {kind: merge, inputs: {masked: 0.4, masked@2: 0.6}}
  open: {kind: merge, inputs: {masked: 0.4, masked@2: 0.6}}
"""
    done, remaining = states(path, merges, "tuned")
    assert done == {"masked", "first", "second", "rest", "apart"}
    assert remaining == ["tuned", "first", "second", "rest", "open"]
    assert asked == [(name, path.parent / "run") for name in ("first", "second", "rest", "apart", "open")]
    finish(load_recipe(path), path.parent / "run", "tuned", '{"step": 10}')
    recipe = load_recipe(path)
    found = stage_states(recipe, [stage_job(recipe, name) for name in recipe.stages], path.parent / "run")
    assert [stage.name for stage in found.remaining] == ["open"]
    # A training stage does not run again because its `init` changed: it would not start from it any more.
    (path.parent / "run/masked/result.json").unlink()
    found = stage_states(
        recipe, [stage_job(recipe, name) for name in ("masked", "tuned")], path.parent / "run"
    )
    assert [stage.name for stage in found.remaining] == ["masked"]

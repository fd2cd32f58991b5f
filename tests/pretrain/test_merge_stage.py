"""A merge stage of a recipe: the files it writes, a killed stage, changed inputs, and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain import merge_stage as stage_module
from pretrain.merge import merge, open_weights
from pretrain.merge_stage import run_merge_stage
from pretrain.recipe.schema import MergeStage, Recipe
from pretrain.run.address import locate
from tests.support.merge_inputs import floats
from tests.support.zero_runs import finish, recipe, training

pytest.importorskip("torch")
TOWER = {"vision.0.w": floats(9, 6)}


@pytest.fixture
def run(tmp_path: Path) -> tuple[Recipe, Path]:
    """Finished stages real and synthetic with the same tower; mix = 0.4 real + 0.6 synthetic."""
    run_dir = tmp_path / "runs/r"
    mix = MergeStage(kind="merge", inputs={"real": 0.4, "synthetic": 0.6}, copy_rest="synthetic")
    made = recipe(run_dir, real=training(), synthetic=training(), mix=mix)
    finish(made, "real", run_dir, {"llm.w": floats(0, 5, 2), "n": np.array([1])}, TOWER)
    finish(made, "synthetic", run_dir, {"llm.w": floats(1, 5, 2), "n": np.array([2])}, TOWER)
    return made, run_dir


def test_mix(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    result = run_merge_stage(made, "mix", run_dir)
    folder = run_dir / "mix"
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["weights"] == {"real": 0.4, "synthetic": 0.6}
    assert any("dromos export" in note for note in result["notes"])
    found = locate("mix", run_dir)
    assert (found.kind, found.stage_dir) == ("folder", folder)
    source = open_weights("mix", run_dir)
    assert set(source.names()) == {"llm.w", "n", "vision.0.w"}
    assert source.frozen == {"vision.0.w"}
    got = load_file(folder / "weights/model.safetensors")
    a, b = floats(0, 5, 2).astype(np.float64), floats(1, 5, 2).astype(np.float64)
    np.testing.assert_array_equal(got["llm.w"], (0.4 * a + 0.6 * b).astype(np.float32))
    np.testing.assert_array_equal(got["n"], [2])
    assert set(got) == {"llm.w", "n"}
    assert (folder / "frozen.safetensors").samefile(run_dir / "synthetic/frozen.safetensors")
    resolved = yaml.safe_load((folder / "resolved.yaml").read_text())
    assert (resolved["name"], resolved["stage"]["kind"]) == ("mix", "merge")


def test_a_finished_stage_is_left_alone(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    first = run_merge_stage(made, "mix", run_dir)
    stamp = (run_dir / "mix/weights/model.safetensors").stat().st_mtime_ns
    assert run_merge_stage(made, "mix", run_dir) == first
    assert (run_dir / "mix/weights/model.safetensors").stat().st_mtime_ns == stamp


def retrain(stage: Path, step: int, digest: str) -> Path:
    """Give `stage` a checkpoint at `step` with other weights, as a longer or a repeated training does."""
    old = next(iter((stage / "checkpoints").glob("step_*")))
    new = stage / f"checkpoints/step_{step:08d}"
    if old != new:
        shutil.copytree(old, new)
    (new / "manifest.json").write_text(
        json.dumps({"mp_rank_00_model_states.pt": {"xxh64": digest, "size": 0}})
    )
    (stage / "result.json").write_text(json.dumps({"step": step, "eval": {}}))
    return new


def test_a_parent_that_trained_further_is_noticed(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    first = run_merge_stage(made, "mix", run_dir)
    stamp = (run_dir / "mix/weights/model.safetensors").stat().st_mtime_ns
    retrain(run_dir / "real", 2, "1" * 16)
    with pytest.raises(UserError, match="merged from other weights") as error:
        run_merge_stage(made, "mix", run_dir)
    text = str(error.value)
    was, now = (str(run_dir / f"real/checkpoints/step_0000000{step}") for step in (1, 2))
    assert f"real: {was} -> {now}\n" in text
    assert "synthetic" not in text
    assert f"delete {run_dir / 'mix'} " in text
    assert json.loads((run_dir / "mix/result.json").read_text()) == first
    assert (run_dir / "mix/weights/model.safetensors").stat().st_mtime_ns == stamp
    shutil.rmtree(run_dir / "mix")  # what the message says to do
    assert run_merge_stage(made, "mix", run_dir)["plan"] != first["plan"]


def test_a_parent_trained_again_to_the_same_step_is_noticed(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    run_merge_stage(made, "mix", run_dir)
    folder = retrain(run_dir / "real", 1, "1" * 16)
    line = f"real: {folder}: mp_rank_00_model_states.pt {'0' * 16} -> {'1' * 16}\n"
    with pytest.raises(UserError, match=re.escape(line)):
        run_merge_stage(made, "mix", run_dir)


def test_a_parent_that_changed_before_a_killed_merge_had_its_result(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    run_merge_stage(made, "mix", run_dir)
    (run_dir / "mix/result.json").unlink()
    retrain(run_dir / "real", 2, "1" * 16)
    with pytest.raises(UserError, match=f"delete {run_dir / 'mix'} "):
        run_merge_stage(made, "mix", run_dir)


def test_parents_that_are_gone_or_moved_leave_a_finished_merge_alone(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    first = run_merge_stage(made, "mix", run_dir)
    moved = run_dir.rename(run_dir.with_name("moved"))
    assert run_merge_stage(made, "mix", moved) == first
    shutil.rmtree(moved / "real")
    assert run_merge_stage(made, "mix", moved) == first


def test_weights_that_were_deleted_are_merged_again(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    first = run_merge_stage(made, "mix", run_dir)
    shutil.rmtree(run_dir / "mix/weights")
    again = run_merge_stage(made, "mix", run_dir)
    assert again["plan"] == first["plan"]
    assert (run_dir / "mix/weights/model.safetensors").is_file()


def test_killed_between_weights_and_result(run: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made, run_dir = run

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            run_merge_stage(made, "mix", run_dir)
    assert not (run_dir / "mix/result.json").exists()
    with pytest.raises(UserError, match="has not finished"):
        locate("mix", run_dir)
    stamp = (run_dir / "mix/weights/model.safetensors").stat().st_mtime_ns
    run_merge_stage(made, "mix", run_dir)
    assert (run_dir / "mix/weights/model.safetensors").stat().st_mtime_ns == stamp


def test_a_parent_that_has_not_finished(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    (run_dir / "real/result.json").unlink()
    with pytest.raises(UserError, match=r"stage real .* has not finished .*--stage real"):
        run_merge_stage(made, "mix", run_dir)
    assert not (run_dir / "mix").exists()


def test_parents_that_do_not_fit_write_nothing(run: tuple[Recipe, Path]) -> None:
    _, run_dir = run
    mix = MergeStage(kind="merge", inputs={"real": 0.5, "other": 0.5})
    made = recipe(run_dir, real=training(), other=training(), mix=mix)
    finish(made, "other", run_dir, {"llm.w": floats(1, 5, 3)}, {"vision.0.w": floats(8, 6)})
    with pytest.raises(UserError, match="3 mismatches") as error:
        run_merge_stage(made, "mix", run_dir)
    assert "llm.w: shape" in str(error.value)
    assert "vision.0.w: is frozen, but differs" in str(error.value)
    assert not (run_dir / "mix").exists()


def test_a_folder_of_another_recipe(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    run_merge_stage(made, "mix", run_dir)
    mix = MergeStage(kind="merge", inputs={"real": 0.5, "synthetic": 0.5}, copy_rest="synthetic")
    other = recipe(run_dir, real=training(), synthetic=training(), mix=mix)
    with pytest.raises(UserError, match=r"0\.4 -> 0\.5"):
        run_merge_stage(other, "mix", run_dir)


def test_a_merge_of_run_addresses_knows_its_model(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    from pretrain.build.saved_stage import read_stage

    made, run_dir = run
    run_merge_stage(made, "mix", run_dir)
    out = tmp_path / "out"
    merge(["mix", "synthetic"], out, beta=0.5, run_dir=run_dir)  # the first parent is itself a merge
    assert yaml.safe_load((out / "resolved.yaml").read_text())["name"] == "synthetic"
    assert read_stage(run_dir / "mix") == read_stage(run_dir / "synthetic")
    assert read_stage(out) == ("synthetic", made.stages["synthetic"])
    assert open_weights(str(out)).frozen == {"vision.0.w"}
    merge([str(out), "real"], tmp_path / "again", beta=0.5, run_dir=run_dir)


def test_a_merge_of_unknown_training_is_named(run: tuple[Recipe, Path]) -> None:
    from pretrain.build.saved_stage import read_stage

    made, run_dir = run
    run_merge_stage(made, "mix", run_dir)
    (run_dir / "synthetic/resolved.yaml").unlink()
    with pytest.raises(UserError, match=r"mix: its model is unknown: resolved\.yaml is missing"):
        read_stage(run_dir / "mix")


def test_hashes_come_from_the_checkpoint_s_manifest(run: tuple[Recipe, Path]) -> None:
    _, run_dir = run
    hashes = open_weights("real", run_dir).hashes()
    assert hashes["mp_rank_00_model_states.pt"] == "0" * 16
    assert hashes["frozen.safetensors"] != "0" * 16

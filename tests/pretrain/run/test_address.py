"""Addresses: every form of the grammar, and the errors of absent weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from pretrain.run.address import locate


def training_stage(stage: Path, steps: tuple[int, ...], finished: bool = True) -> Path:
    for step in steps:
        folder = stage / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "mp_rank_00_model_states.pt").write_bytes(b"")
        (folder / "COMPLETE").write_text("")
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "resolved.yaml").write_text("stage: {}\n")
    if finished:
        (stage / "result.json").write_text(json.dumps({"step": max(steps)}))
    return stage


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/flip {masked (10, 20), tuned (5)}, runs/sphinx {mix (merge), half (unfinished)}; cwd elsewhere."""
    home = tmp_path / "elsewhere"
    home.mkdir()
    monkeypatch.chdir(home)
    root = tmp_path / "runs"
    training_stage(root / "flip/masked", (10, 20))
    training_stage(root / "flip/tuned", (5,))
    training_stage(root / "sphinx/half", (7,), finished=False)
    (root / "sphinx/mix/weights").mkdir(parents=True)
    (root / "sphinx/mix/resolved.yaml").write_text("stage: {}\n")
    (root / "sphinx/mix/result.json").write_text("{}")
    for run in ("flip", "sphinx"):
        (root / run / "recipe.yaml").write_text("stages: {}\n")
    return root


def test_stage_name_is_a_stage_of_this_run(runs: Path) -> None:
    found = locate("masked", runs / "flip")
    assert (found.kind, found.step, found.stage_dir) == ("checkpoint", 20, runs / "flip/masked")
    assert Path(found.path) == runs / "flip/masked/checkpoints/step_00000020"


def test_stage_name_never_means_a_folder_of_the_same_name_here(runs: Path) -> None:
    Path("nowhere").mkdir()
    with pytest.raises(UserError, match=r"stage nowhere .*dromos run RECIPE --stage nowhere"):
        locate("nowhere", runs / "flip")
    assert locate("./nowhere", runs / "flip").kind == "folder"


def test_run_is_a_path_or_a_name_beside_this_run(runs: Path) -> None:
    beside = locate("flip/tuned", runs / "sphinx")
    by_path = locate(str(runs / "flip/tuned"))
    assert Path(beside.path) == Path(by_path.path) == runs / "flip/tuned/checkpoints/step_00000005"


def test_run_that_is_both_here_and_beside_is_refused(runs: Path) -> None:
    training_stage(Path("flip/tuned"), (1,))
    with pytest.raises(UserError, match=r"ambiguous: flip/tuned and \S+flip/tuned are both stages"):
        locate("flip/tuned", runs / "sphinx")
    assert locate("./flip/tuned", runs / "sphinx").step == 1


@pytest.mark.parametrize(("which", "step"), [("@10", 10), ("@20", 20), ("@latest", 20), ("", 20)])
def test_which_step(runs: Path, which: str, step: int) -> None:
    assert locate("masked" + which, runs / "flip").step == step
    assert locate(f"flip/masked{which}", runs / "sphinx").step == step


def test_an_absent_step_lists_the_steps(runs: Path) -> None:
    with pytest.raises(UserError, match=r"step 15.*steps 10, 20"):
        locate("masked@15", runs / "flip")


def test_incomplete_checkpoint_does_not_count(runs: Path) -> None:
    (runs / "flip/masked/checkpoints/step_00000020/COMPLETE").unlink()
    (runs / "flip/masked/checkpoints/step_00000030.tmp").mkdir()
    assert locate("masked@latest", runs / "flip").step == 10
    with pytest.raises(UserError, match="not complete"):
        locate(str(runs / "flip/masked/checkpoints/step_00000020"))


@pytest.mark.parametrize("newest", [10, 30])
def test_a_result_of_another_step_does_not_make_the_newest_checkpoint_a_finished_stage(
    runs: Path, newest: int
) -> None:
    """A stage that finished at step 20 now trains to 30, or its last checkpoint was deleted."""
    if newest > 20:
        training_stage(runs / "flip/masked", (newest,), finished=False)
    else:
        shutil.rmtree(runs / "flip/masked/checkpoints/step_00000020")
    with pytest.raises(UserError, match=rf"not finished \(.*step 20.*newest checkpoint: step {newest}\)"):
        locate("masked", runs / "flip")
    assert locate("masked@latest", runs / "flip").step == newest
    (runs / "flip/masked/result.json").write_text(json.dumps({"step": newest}))
    assert locate("masked", runs / "flip").step == newest


def test_a_damaged_result_is_named(runs: Path) -> None:
    (runs / "flip/masked/result.json").write_text('{"step": 2')
    with pytest.raises(UserError, match=r"masked/result\.json is not valid JSON; delete it to run"):
        locate("masked", runs / "flip")


def test_unfinished_stage_needs_an_explicit_step(runs: Path) -> None:
    with pytest.raises(
        UserError, match=r"has not finished \(newest checkpoint: step 7\).*--stage half.*@latest"
    ):
        locate("half", runs / "sphinx")
    assert locate("half@latest", runs / "sphinx").step == 7
    assert locate("half@7", runs / "sphinx").step == 7


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        (
            [(10, {"zero_shot": {"digits": {"top1": 0.9}}}), (20, {"zero_shot": {"digits": {"top1": 0.8}}})],
            10,
        ),
        ([(10, {"perplexity": {"real": {"nll": 2.0}}}), (20, {"perplexity": {"real": {"nll": 1.0}}})], 20),
        ([(10, {"perplexity": {"real": {"nll": 2.0}}}), (15, {"perplexity": {"real": {"nll": 1.0}}})], 10),
    ],
)
def test_best(runs: Path, rows: list[tuple[int, dict]], step: int) -> None:
    lines = [json.dumps({"step": s, "eval": e}) for s, e in rows]
    (runs / "flip/masked/metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert locate("masked@best", runs / "flip").step == step


def test_best_ignores_a_partial_last_line(runs: Path) -> None:
    lines = [json.dumps({"step": s, "eval": {"real": {"nll": s}}}) for s in (10, 20)]
    (runs / "flip/masked/metrics.jsonl").write_text("\n".join([*lines, '{"step": 21, "ev']))
    assert locate("masked@best", runs / "flip").step == 10


def test_best_without_evaluation(runs: Path) -> None:
    with pytest.raises(UserError, match="evaluation"):
        locate("masked@best", runs / "flip")


def test_merge_stage(runs: Path) -> None:
    found = locate("mix", runs / "sphinx")
    assert (found.kind, Path(found.path), found.stage_dir) == (
        "folder",
        runs / "sphinx/mix/weights",
        runs / "sphinx/mix",
    )
    assert locate(str(runs / "sphinx/mix/weights")).stage_dir == runs / "sphinx/mix"
    with pytest.raises(UserError, match="merge stage"):
        locate("mix@3", runs / "sphinx")
    (runs / "sphinx/mix/result.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        locate("mix", runs / "sphinx")


def test_stage_that_has_not_run_names_the_command(runs: Path) -> None:
    with pytest.raises(
        UserError, match=r"stage later of .*flip has not run; run: dromos run RECIPE --stage later"
    ):
        locate("flip/later", runs / "sphinx")


def test_run_without_stage_lists_the_stages(runs: Path) -> None:
    with pytest.raises(UserError, match="stages: masked, tuned"):
        locate(str(runs / "flip"))


def test_plain_paths(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    weights = tmp_path / "odd@12"
    weights.mkdir()
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert locate(str(tmp_path / "hf")).kind == "folder"
    assert locate(str(file)).kind == "file"
    assert locate(str(weights)).path == str(weights)
    found = locate(str(runs / "flip/masked/checkpoints/step_00000010"))
    assert (found.kind, found.step, found.stage_dir) == ("checkpoint", 10, runs / "flip/masked")
    with pytest.raises(UserError, match="needs a stage"):
        locate(str(tmp_path / "hf") + "@latest")


@pytest.mark.parametrize("name", ["models/x", "models/x@3", "models/x@latest"])
def test_a_path_may_begin_in_the_home_folder_and_end_like_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for address in (f"~/{name}", f" {tmp_path}/{name}\n"):
        found = locate(address)
        assert (found.kind, found.path, found.step) == ("folder", str(tmp_path / name), None)


def test_the_output_of_a_merge_is_a_folder_with_its_model(tmp_path: Path) -> None:
    for name in ("model.safetensors", "merge.json", "resolved.yaml"):
        (tmp_path / name).write_text("{}")
    found = locate(str(tmp_path))
    assert (found.kind, found.stage_dir) == ("folder", tmp_path)


def test_foreign_deepspeed_folder(tmp_path: Path) -> None:
    tag = tmp_path / "out/global_step4"
    tag.mkdir(parents=True)
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"")
    (tmp_path / "out/latest").write_text("global_step4")
    for address in (tmp_path / "out", tag):
        found = locate(str(address))
        assert (found.kind, found.path, found.stage_dir) == ("checkpoint", str(tag), None)
    (tmp_path / "out/latest").write_bytes(b"\xff\x00")
    assert locate(str(tmp_path / "out")).kind == "folder"  # the error comes when it is opened


def test_schemes() -> None:
    assert locate("s3://bucket/run/weights/").path == "s3://bucket/run/weights"
    assert locate("s3://bucket/m.safetensors").kind == "file"
    assert locate("hf://org/name@main").path == "org/name@main"
    found = locate("open_clip://ViT-B-32/openai")
    assert (found.kind, found.path) == ("open_clip", "ViT-B-32/openai")
    assert found == locate(" open_clip://ViT-B-32/openai ")
    with pytest.raises(UserError, match="unknown scheme ftp"):
        locate("ftp://x/y")
    with pytest.raises(UserError, match="s3://: nothing follows ://"):
        locate("s3://")
    with pytest.raises(UserError, match="empty address"):
        locate("")


def test_absent_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="RUN/STAGE"):
        locate("no_such_thing_anywhere")
    with pytest.raises(UserError, match="not found"):
        locate(str(tmp_path / "a/b"))


def test_a_misspelt_path_gets_a_suggestion_and_a_hub_name_its_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/tuned").mkdir(parents=True)
    for address, meant in (("model", "models"), ("models/tunde", "models/tuned"), ("./modls", "modls")):
        with pytest.raises(UserError, match=f"did you mean (\\./)?{meant.replace('modls', 'models')}\\?"):
            locate(address)
    with pytest.raises(UserError, match="on the Hugging Face hub it is hf://meta-llama/Llama-3-8B"):
        locate("meta-llama/Llama-3-8B")
    for address in ("/no/such", "./no/such", "a/b/c"):
        with pytest.raises(UserError) as caught:
            locate(address)
        assert "hf://" not in str(caught.value)

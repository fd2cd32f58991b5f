"""The `dromos` command: help, light commands, and one message with exit code 2 for a user's mistake."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from data_pipeline.errors import ReadError, UserError
from launch.cli.app import app, split_stages
from launch.cli.base import as_json
from launch.status import find_runs
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from tests.support.launching import ROOT, write_recipe

DEMO = str(ROOT / "configs/demo/flip.yaml")
COMMANDS = ("run", "train", "merge", "sweep", "eval", "export", "report", "status", "list")
GROUPS = {"recipe": ("show", "check"), "data": ("index", "show", "prepare")}


def dromos(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="dromos")


def contents(folder: Path) -> dict[str, Any]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def pages() -> list[list[str]]:
    return [[name] for name in COMMANDS] + [
        [group, name] for group, names in GROUPS.items() for name in names
    ]


# --- help; start-up is in test_light.py


def test_help_lists_every_command_with_a_sentence() -> None:
    text = dromos("--help").stdout
    for name in (*COMMANDS, *GROUPS):
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3
    assert "0 done, 2 your input is wrong, 75 stopped" in " ".join(text.split())


@pytest.mark.parametrize(
    "path",
    pages(),
    ids=" ".join,
)
def test_each_help_has_an_example_of_its_own(path: list[str]) -> None:
    done = dromos(*path, "--help")
    assert done.exit_code == 0
    assert f"dromos {' '.join(path)} " in done.stdout.partition("Example")[2]


def examples() -> list[list[str]]:
    """The examples of all help pages, without the leading `dromos`."""
    shown = "\n".join(dromos(*path, "--help").stdout for path in [[], *pages()])
    return [shlex.split(line)[1:] for line in re.findall(r"^ +(?:Try: +)?(dromos .*)$", shown, re.MULTILINE)]


def test_every_example_is_one_that_its_command_takes() -> None:
    """Parse the examples without running them."""
    root = get_command(app)
    found = examples()
    assert len(found) > 20
    for words in found:
        command, arguments = root.commands[words[0]], words[1:]  # type: ignore[attr-defined]
        if words[0] in GROUPS:
            command, arguments = command.commands[words[1]], words[2:]
        command.make_context(words[0], arguments)


def test_light_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the examples that read only recipes of the repository; a model needs the demo's tokenizer."""
    monkeypatch.chdir(ROOT)
    light = [
        words
        for words in examples()
        if (words[0] == "recipe" and "--model" not in words) or (words[0] == "run" and "--dry-run" in words)
    ]
    assert len(light) >= 4
    for words in light:
        done = dromos(*words)
        assert done.exit_code == 0, (words, done.stderr)


def test_help_is_written_for_people() -> None:
    text = dromos("--help").stdout
    assert not [line for line in text.partition("Commands:")[2].splitlines() if line.endswith("...")]
    for path in pages():
        text = dromos(*path, "--help").stdout
        typed = text.replace("{00000..", "").replace("{}", "")  # both are what a person types
        assert not re.search(r"[{<]|x>=", typed), text
    assert "dromos run [OPTIONS] RECIPE [KEY=VALUE]..." in dromos("run", "--help").stdout
    assert "dromos merge [OPTIONS] A B [C]...\n" in dromos("merge", "--help").stdout
    assert "dromos data show [OPTIONS] SRC...\n" in dromos("data", "show", "--help").stdout


@pytest.mark.parametrize("command", ["eval", "export"])
def test_help_offers_only_the_addresses_that_are_taken(command: str, tmp_path: Path) -> None:
    text = dromos(command, "--help").stdout
    assert "RUN/STAGE@STEP, @latest or @best" in " ".join(text.split())
    assert "://" not in text


def test_version() -> None:
    from importlib.metadata import version

    assert dromos("--version").stdout.strip() == f"dromos {version('dromos')}"


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe", "show", "nowhere.yaml"], ["nowhere.yaml", "no such recipe"]),
        (["recipe", "check", DEMO, "train.stepz=5"], ["train.stepz", "'steps'"]),
        (["recipe", "show", DEMO, "--stage", "tunde"], ["'tunde'", "'tuned'"]),
        (["run", DEMO, "train.stepz=5"], ["train.stepz"]),
        (["run", DEMO, "--stage", "masked", "tuned.train.steps=5"], ["'tuned'", "not selected"]),
        (["run", DEMO, "--on", "moon"], ["moon", "slurm"]),
        (["run", DEMO, "engine.offload=cpu"], ["engine.offload", "not available yet"]),
        (["train", DEMO], ["--stage", "masked, tuned"]),
        (["data", "prepare", str(ROOT / "configs/flip/laion400m-l16.yaml")], ["prepare:"]),
        (["data", "show", "nowhere"], ["nowhere"]),
        (["data", "index", str(ROOT / "configs")], ["configs", "tar"]),
        (["status", str(ROOT / "configs")], ["not a run folder"]),
        (["report", str(ROOT / "configs")], ["not a run folder"]),
        (["merge", "nowhere/a", "nowhere/b", "--beta", "0.5", "--out", "x"], ["nowhere/a"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = dromos(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("dromos: ")
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.stderr
    assert contents(tmp_path) == {}  # nothing was written


def test_the_process_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "run", "nowhere.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"dromos: nowhere.yaml: no such recipe; the path is relative to {tmp_path}\n"


def test_an_error_of_ours_keeps_its_traceback_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("launch.status.find_runs", broken)
    done = dromos("list")
    assert done.exit_code == 1
    assert isinstance(done.exception, RuntimeError)


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'dromos[train]'"),
        (ModuleNotFoundError("No module named 'ray'", name="ray.job"), 2, "pip install 'dromos[ray]'"),
        (ModuleNotFoundError("No module named 's3fs'", name="s3fs"), 2, "pip install 'dromos[s3]'"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (ReadError("s3://corpus could not be read"), 1, "dromos: s3://corpus could not be read"),
        (UserError("two\nlines"), 2, "dromos: two\nlines"),
    ],
)
def test_what_stops_a_command_is_said_in_words(
    raised: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("launch.status.find_runs", stop)
    done = dromos("list")
    assert done.exit_code == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == len(words.splitlines())


# --- what the light commands say


def test_show_prints_a_recipe_that_is_the_same_recipe(tmp_path: Path) -> None:
    done = dromos("recipe", "show", DEMO, "optimizer.lr=5e-4", "tuned.train.steps=7")
    shown = tmp_path / "shown.yaml"
    shown.write_text(done.stdout)
    assert load_recipe(shown) == load_recipe(DEMO, ["optimizer.lr=5e-4", "tuned.train.steps=7"])
    one = dromos("recipe", "show", DEMO, "--stage", "tuned").stdout
    assert "  tuned:" in one
    assert "  masked:" not in one


def test_check_has_a_line_a_stage_and_names_the_command_that_makes_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = dromos("recipe", "check", DEMO)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["masked", "tuned"]
    assert all(line.endswith("ok") for line in lines)
    assert f"dromos data prepare {DEMO}" in done.stderr
    assert "data/demo/digits/train" in done.stderr


def test_check_names_what_is_not_available_yet() -> None:
    done = dromos("recipe", "check", str(ROOT / "configs/sphinx/7b-1k.yaml"))
    assert done.exit_code == 2
    assert "model.vision: more than one vision tower is not available yet" in done.stdout
    assert "mix: merge (linear) 0.5 x real + 0.5 x synthetic  ok" in done.stdout


def test_check_warns_of_a_long_warm_up() -> None:
    done = dromos("recipe", "check", DEMO, "masked.train.steps=10")
    assert done.exit_code == 0
    assert "warning: schedule.warmup (20 steps) is longer than the training (10 steps)" in done.stdout


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    done = dromos("run", str(recipe), "--ranks-per-node", "2", "--dry-run", "train.steps=5")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count(f"train {recipe} --stage masked train.steps=5") == 2
    assert done.stdout.count(f"train {recipe} --stage tuned train.steps=5") == 2
    assert contents(tmp_path) == before


def test_figures_are_printed_as_json_with_flat_lists_on_one_line() -> None:
    values = {"top1": 0.5, "confusion": [[1, 2], [3, 4]], "names": ["a, b", 'c  "d" ]', "[é]"], "none": {}}
    text = as_json(values)
    assert json.loads(text) == values
    assert "    [3, 4]" in text.splitlines()


def test_stages_are_split() -> None:
    assert split_stages(["a,b", "c"]) == ["a", "b", "c"]
    assert split_stages(None) is None


def test_status_and_list_read_the_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small"
    loaded = load_recipe(write_recipe(tmp_path))
    (run / "masked" / "checkpoints" / "step_00000020").mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump(loaded))
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 21)]
    (run / "masked" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2'
    )
    done = dromos("status", str(run))
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["masked", "not", "finished", "step", "20/20", "loss", "0.0500"],
        ["tuned", "not", "started"],
    ]
    (run / "masked" / "checkpoints" / "step_00000020" / "COMPLETE").write_text("")
    assert "newest checkpoint 20" in dromos("status", str(run)).stdout
    (run / "masked" / "result.json").write_text('{"step": 20}')
    assert dromos("list", str(tmp_path)).stdout == f"{run}: masked done, tuned not started\n"
    assert find_runs(tmp_path) == [run]
    assert "small" in dromos("status", str(tmp_path / "runs")).stderr  # names the runs that are there

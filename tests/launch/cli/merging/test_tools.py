"""`dromos soup`, `verify` and `diff` from the command line: output, files, exit codes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from launch.cli.app import app
from tests.support.merge_inputs import floats, write
from tests.support.scorers import scorer


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        layers = {f"l.{i}.mlp.w": floats(seed * 9 + i, 4, 3) for i in range(2)}
        write(tmp_path / name, {"w": floats(seed, 4, 3), **layers})
    return tmp_path


def dromos(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_soup(models: Path) -> None:
    command = scorer(models, "print(-abs(x))")
    result = dromos("soup", "./a", "./b", "./c", "--score-cmd", command, "--out", "s")
    assert result.exit_code == 0, result.output
    assert "soup: the mean of " in result.output
    assert Path("s/model.safetensors").is_file()
    again = dromos("soup", "./a", "./b", "./c", "--score-cmd", command, "--out", "s")
    assert again.exit_code == 0
    assert "already complete" in again.output


@pytest.mark.parametrize("out", ["", ".", ".."])
@pytest.mark.parametrize("command", [("merge", "--method", "soup"), ("soup", "--uniform")])
def test_out_is_the_name_of_a_folder(
    models: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], out: str
) -> None:
    (models / "inner" / "empty").mkdir(parents=True)
    monkeypatch.chdir(models / "inner" / "empty")
    result = dromos(*command, str(models / "a"), str(models / "b"), "--out", out)
    assert result.exit_code == 2
    assert "give the name of a folder to create" in result.output
    assert [path.name for path in (models / "inner").rglob("*")] == ["empty"]


def test_a_folder_whose_weights_are_gone_is_not_done(models: Path) -> None:
    words = ("merge", "./a", "./b", "--beta", "0.3", "--out", "m")
    assert dromos(*words).exit_code == 0
    weights = Path("m/model.safetensors")
    whole = weights.read_bytes()
    for content in (whole[:-1], None):
        weights.unlink() if content is None else weights.write_bytes(content)
        again = dromos(*words)
        assert again.exit_code == 2
        assert "m/model.safetensors: is missing or has another size" in again.output
    weights.write_bytes(whole)
    assert "already complete" in dromos(*words).output


def test_an_input_that_changed_is_named_as_a_reason(models: Path) -> None:
    words = ("merge", "./a", "./b", "--beta", "0.3", "--out", "m")
    assert dromos(*words).exit_code == 0
    raw = bytearray(Path("a/model.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("a/model.safetensors").write_bytes(raw)
    again = dromos(*words)
    assert again.exit_code == 2
    assert "the inputs changed since" in again.output


def test_verify_elsewhere_says_why_inputs_are_gone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dromos("merge", "./a", "./b", "--beta", "0.3", "--out", "m").exit_code == 0
    monkeypatch.chdir("/")
    result = dromos("verify", str(models / "m"))
    assert result.exit_code == 0
    assert "its path is relative: run verify in the folder in which the merge ran" in result.output


def test_what_is_not_mixed_is_said(models: Path) -> None:
    for name in "ab":
        extra = {"ids": np.arange(3), **({"only_a": floats(3, 2)} if name == "a" else {})}
        write(models / f"{name}i", {"w": floats(ord(name), 4), **extra})
    pair = ("merge", "./ai", "./bi", "--beta", "0.5")
    assert (
        "1 tensors mixed, 1 copied (integer), 1 left out, "
        in dromos(*pair, "--copy-rest", "B", "--out", "m1").output
    )
    result = dromos(*pair, "--copy-rest", "A", "--rule", "ids=copy:B", "--out", "m2")
    assert "1 tensors mixed, 2 copied (1 rule, 1 rest), " in result.output


def test_letters_are_those_of_inputs(models: Path) -> None:
    result = dromos("merge", "./a", "./b", "--beta", "0.5", "--only", "w", "--copy-rest", "C", "--out", "m")
    assert result.exit_code == 2
    assert "C: no such input; the inputs are A to B" in result.output


def test_a_soup_without_scores_is_uniform_or_refused(models: Path) -> None:
    refused = dromos("soup", "./a", "./b", "--out", "s")
    assert refused.exit_code == 2
    assert "--score-cmd CMD is missing" in refused.output
    assert dromos("soup", "./a", "./b", "--uniform", "--out", "s").exit_code == 0
    assert json.loads(Path("s/soup.json").read_text())["recipe"] == "uniform"


def test_verify(models: Path) -> None:
    assert dromos("merge", "./a", "./b", "--beta", "0.3", "--out", "m").exit_code == 0
    result = dromos("verify", "m", "--chunks", "5")
    assert result.exit_code == 0, result.output
    assert "5 chunks recomputed from the inputs: identical bytes" in result.output
    assert result.output.endswith("m: nothing is wrong\n")
    raw = bytearray(Path("m/model.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("m/model.safetensors").write_bytes(raw)
    broken = dromos("verify", "m")
    assert broken.exit_code == 1
    assert broken.output.startswith("WRONG  model.safetensors: ")
    found = json.loads(dromos("verify", "m", "--json").stdout)
    assert found["wrong"] is True
    assert [one["state"] for one in found["inputs"]] == ["unchanged", "unchanged"]
    for folder in ("a", "nowhere"):
        refused = dromos("verify", folder)
        assert refused.exit_code == 2
        assert "merge.json" in refused.output


@pytest.mark.parametrize("content", ["[1, 2]", "{", '{"plan": 1, "inputs": [], "output": []}', "[" * 100_000])
def test_a_damaged_record_is_one_message(models: Path, content: str) -> None:
    words = ("merge", "./a", "./b", "--beta", "0.3", "--out", "m")
    assert dromos(*words).exit_code == 0
    Path("m/merge.json").write_text(content)
    again, checked = dromos(*words), dromos("verify", "m")
    assert again.exit_code == 2
    assert "m/merge.json" in again.output
    assert "choose another --out" in again.output
    assert checked.exit_code in (1, 2)
    assert "merge.json" in checked.output


def test_diff(models: Path) -> None:
    result = dromos("diff", "./a", "./b", "--top", "1", "--csv", "d.csv", "--picture", "d.svg")
    assert result.exit_code == 0, result.output
    assert "l.*.mlp" in result.output
    assert "... and 2 more" in result.output
    assert len(Path("d.csv").read_text().splitlines()) == 4
    ElementTree.parse("d.svg")
    found = json.loads(dromos("diff", "./a", "./b", "--json", "--depth", "1").stdout)
    assert set(found["modules"]) == {"w", "l.*"}
    assert len(found["tensors"]) == 3
    assert dromos("diff", "./a", "./nowhere").exit_code == 2
    Path("file").touch()
    for option, path in (("--csv", "a"), ("--picture", "file/d.svg")):
        refused = dromos("diff", "./a", "./b", option, path)
        assert refused.exit_code == 2
        assert f"{path}: cannot be written" in refused.output
    refused = dromos("diff", "./a", "./b", "--picture", "d.png")
    assert (refused.exit_code, Path("d.png").exists()) == (2, False)
    assert "--picture d.png: the picture is SVG; name it d.svg" in refused.output
    assert "the same: 3 tensors" in dromos("diff", "./a", "./a").output


@pytest.mark.parametrize("command", ["merge", "sweep", "soup", "verify", "diff"])
def test_help_has_examples_that_begin_with_the_command(command: str) -> None:
    result = dromos(command, "--help")
    assert result.exit_code == 0
    assert f"  dromos {command} " in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 100


def test_another_merge_is_told_apart(models: Path) -> None:
    assert dromos("merge", "./a", "./b", "--beta", "0.3", "--out", "m").exit_code == 0
    for words, told in (
        (("--beta", "0.25"), "weights [0.3, 0.7], not [0.25, 0.75]"),
        (("--beta", "0.3", "--dtype", "bf16"), 'dtype null, not "BF16"'),
    ):
        other = dromos("merge", "./a", "./b", *words, "--out", "m")
        assert other.exit_code == 2
        assert f"m has another merge with {told} (see m/merge.json)" in other.output


@pytest.mark.parametrize("out", ["a/mix", "a/x/../mix", "./a/very/deep"])
def test_an_output_within_an_input_is_refused(models: Path, out: str) -> None:
    before = sorted(Path("a").iterdir())
    for command in (("merge", "--beta", "0.3"), ("sweep", "--betas", "0.5"), ("soup", "--uniform")):
        refused = dromos(command[0], "./a", "./b", *command[1:], "--out", out)
        assert refused.exit_code == 2
        assert "is inside the input ./a; choose a folder outside" in refused.output
    assert sorted(Path("a").iterdir()) == before


def test_an_input_named_twice_is_noted_and_a_spec_among_inputs_is_refused(models: Path) -> None:
    assert (
        "note: A (./a) and B (b/../a) are the same weights"
        in dromos("merge", "./a", "b/../a", "--beta", "0.3", "--out", "m").output
    )
    refused = dromos("merge", "mergekit.yml", "./out")
    assert refused.exit_code == 2
    assert "dromos merge --spec mergekit.yml --out DIR" in refused.output


def test_patterns_are_said_as_they_were_typed(models: Path) -> None:
    assert (
        r"no tensor matches '^no\.such'"
        in dromos("merge", "./a", "./b", "--beta", "1", "--only", r"^no\.such").output
    )
    curve = dromos("merge", "./a", "./b", "--beta", "0.3", "--layers", "0:9", "--curve", "0,1", "--dry-run")
    assert "the curve is for layers 0:9, but no name has a layer" in curve.output


def test_verify_names_the_problem_of_a_folder_that_is_not_a_merge(models: Path) -> None:
    assert dromos("sweep", "./a", "./b", "--betas", "0,1", "--out", "s").exit_code == 0
    for folder, told in (
        ("s", "s: a sweep; name one of its outputs, such as s/beta-0.00"),
        ("./nowhere", "./nowhere: no such folder"),
        ("a", "a: no merge.json in it"),
    ):
        refused = dromos("verify", folder)
        assert (refused.exit_code, told in refused.output) == (2, True), refused.output
    assert dromos("verify", "s/beta-0.00").exit_code == 0


def test_verify_says_why_nothing_is_recomputed(models: Path) -> None:
    assert dromos("merge", "./a", "./b", "--beta", "0.3", "--out", "m").exit_code == 0
    raw = bytearray(Path("m/model.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("m/model.safetensors").write_bytes(raw)
    result = dromos("verify", "m")
    assert result.exit_code == 1
    assert "nothing could be recomputed from the inputs: no weight file is intact" in result.output


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("out", ["link", "link/"])
def test_an_output_through_a_link_goes_where_it_leads(models: Path, there: bool, out: str) -> None:
    Path("scratch").mkdir()
    if there:
        Path("scratch/m").mkdir()
    Path("link").symlink_to("scratch/m")
    for command in (("merge", "--beta", "0.3"), ("merge", "--beta", "0.3"), ("soup", "--uniform")):
        words = (command[0], "./a", "./b", *command[1:], "--out", out if command[0] == "merge" else "link2")
        if command[0] == "soup":
            Path("link2").symlink_to("scratch/s")
        result = dromos(*words)
        assert result.exit_code == 0, result.output
    assert Path("link").is_symlink()
    assert Path("scratch/m/model.safetensors").is_file()
    assert Path("scratch/s/soup.json").is_file()
    assert dromos("verify", "link").exit_code == 0


def test_a_name_that_is_too_long_is_one_message(models: Path) -> None:
    refused = dromos("merge", "./a", "./b", "--beta", "0.3", "--out", "x" * 300)
    assert refused.exit_code == 2
    assert "cannot be written: File name too long" in refused.output

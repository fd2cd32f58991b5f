"""Scoring commands run without a shell; their last line is parsed, or the error names the log."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from pretrain.merge.sweeps.scoring import choose_metric, direction_note, parse_command, read_metrics, score


@pytest.mark.parametrize(
    ("line", "metrics"),
    [
        ("0.75", {"score": 0.75}),
        ("-3", {"score": -3.0}),
        ("1e-3", {"score": 0.001}),
        ("nan", {"score": None}),
        ("-inf", {"score": None}),
        ('{"top1": 0.5, "n": 3}', {"top1": 0.5, "n": 3.0}),
        ('{"a": {"b": 1, "c": {"d": 2}}, "name": "x", "ok": true, "l": [1]}', {"a.b": 1.0, "a.c.d": 2.0}),
        ('{"loss": NaN, "top1": 1}', {"loss": None, "top1": 1.0}),
    ],
)
def test_metrics(line: str, metrics: dict[str, float | None]) -> None:
    assert read_metrics(line) == metrics


@pytest.mark.parametrize(
    "line", ["", "done", "0.5 0.6", "{}", '{"name": "x"}', "[1, 2]", "true", "{" * 5000, '"3"']
)
def test_lines_without_a_metric_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"(the end of its output|its output must end)"):
        read_metrics(line)


def test_the_folder_is_one_argument_and_no_shell_runs(tmp_path: Path) -> None:
    folder = tmp_path / "a b; touch nasty $(x)"
    folder.mkdir()
    (folder / "figure").write_text("loading\n0.25\n\n")
    command = parse_command("cat {}/figure", "--eval-cmd")
    assert command.words_for(folder) == ["cat", f"{folder}/figure"]
    assert score(command, folder, tmp_path / "logs/one") == {"score": 0.25}
    assert (tmp_path / "logs/one.out").read_text() == "loading\n0.25\n\n"
    assert not (tmp_path / "nasty").exists()


def test_both_streams_are_logged_and_only_the_output_counts(tmp_path: Path) -> None:
    command = parse_command("sh -c 'echo 0.5; echo 9 >&2; : {}'", "--eval-cmd")
    assert score(command, tmp_path, tmp_path / "l") == {"score": 0.5}
    assert (tmp_path / "l.err").read_text() == "9\n"


def test_an_object_may_end_the_output_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "o").write_text(
        '{"a": 1}\nloading\n{\n  "x": {\n    "y": 2\n  },\n  "l": [\n    {"z": 3}\n  ]\n}\n'
    )
    assert score(parse_command("cat {}/o", "--eval-cmd"), tmp_path, tmp_path / "l") == {"x.y": 2.0}
    (tmp_path / "o").write_text('{\n"x": 2\n}\n}\n')
    with pytest.raises(UserError, match="the end of its output, '}'"):
        score(parse_command("cat {}/o", "--eval-cmd"), tmp_path, tmp_path / "l")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sh -c 'echo reading; echo broken >&2; exit 3; {}'", r"exit code 3; see .*l\.err\n  broken"),
        ("sh -c 'kill -9 $$; {}'", "killed by signal 9"),
        ("echo hello {}", r"the end of its output, 'hello .* is neither a number .*; see .*l\.out"),
        ("true {}", "it printed nothing"),
    ],
)
def test_a_command_that_fails_is_one_error_that_names_the_log(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        score(parse_command(text, "--eval-cmd"), tmp_path, tmp_path / "l")


def test_a_command_that_hangs_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    command = parse_command("sh -c 'sleep 60 & echo $! > {}/pid; wait'", "--eval-cmd", seconds=0.5)
    with pytest.raises(UserError, match=r"killed after 0\.5 s \(--timeout\)"):
        score(command, tmp_path, tmp_path / "l")
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not _runs(child):
            return
        time.sleep(0.05)
    raise AssertionError("what the command started still runs")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("text", "seconds", "why"),
    [
        ("python eval.py", None, "write {} in place of the checkpoint folder"),
        ("", None, "write {}"),
        ("eval 'x {}", None, "No closing quotation"),
        ("no-such-program-here {}", None, "no such program"),
        ("cat {} | tail -1", None, r"\| needs a shell, and the command runs without one; write sh -c"),
        ("cat {} 2>&1", None, "2>&1 needs a shell"),
        ("cat {}", 0.0, "above 0"),
        ("cat {}", float("nan"), "above 0"),
    ],
)
def test_commands_that_are_refused(text: str, seconds: float | None, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_command(text, "--eval-cmd", seconds)


def test_the_words_may_be_wrapped(tmp_path: Path) -> None:
    command = parse_command("echo {}", "--eval-cmd", wrapped=lambda words: ["sh", "-c", "echo 4", *words])
    assert score(command, tmp_path, tmp_path / "l") == {"score": 4.0}
    assert os.listdir(tmp_path) != []


def test_the_metric_is_the_first_or_the_named_one() -> None:
    assert choose_metric({"a": 1.0, "b": 2.0}, None) == "a"
    assert choose_metric({"a": 1.0, "b": 2.0}, "b") == "b"
    with pytest.raises(UserError, match="the command printed a, b"):
        choose_metric({"a": 1.0, "b": 2.0}, "c")


@pytest.mark.parametrize(
    ("metric", "lower", "noted"),
    [
        ("perplexity.text", False, True), ("val_loss", False, True), ("nll", False, True), ("real.nll", False, True),
        ("perplexity.text", True, False), ("top1", False, False), ("score", False, False), (None, False, False),
        ("fidelity", False, False),
    ],
)  # fmt: skip
def test_metrics_that_are_usually_better_when_lower_are_noted(
    metric: str | None, lower: bool, noted: bool
) -> None:
    assert (direction_note(metric, lower) is not None) is noted

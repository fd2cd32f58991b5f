"""Interrupted commands: message, exit code, no process left, resume; and lines printed above a progress bar."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.launching import wait_for
from tests.support.merge_inputs import floats, write
from tests.support.scorers import scorer

SLOW = "\nopen('pid', 'w').write(str(os.getpid()))\nimport time; time.sleep(60)\n"
COMMANDS = {"sweep": ("--betas", "0:1:0.5", "--eval-cmd"), "soup": ("--score-cmd",)}


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write(tmp_path / name, {"w": floats(seed, 4, 3)})
    return "./a", "./b"


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from launch.cli import main; main()", *words]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stop_is_said_ends_the_scorer_and_goes_on(
    pair: tuple[str, str], name: str, number: signal.Signals
) -> None:
    words = (name, *pair, "--out", "out", *COMMANDS[name])
    process = commands.start(*words, scorer(Path(), SLOW))
    wait_for(lambda: Path("pid").exists() and bool(Path("pid").read_text()), "the scoring command", 30)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (
        75,
        "dromos: interrupted; the same command resumes\n",
    )
    assert not Path(f"/proc/{Path('pid').read_text()}").exists()
    again = commands.run(*words, scorer(Path(), "print(x)"))
    assert again.returncode == 0, again.stderr


def test_what_is_ignored_stays_ignored(pair: tuple[str, str]) -> None:
    words = command("sweep", *pair, "--out", "out", "--betas", "1", "--eval-cmd")
    body = "\nopen('pid', 'w').write('x')\nimport time; time.sleep(1)\nprint(x)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        process = subprocess.Popen([*words, scorer(Path(), body)], stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(Path("pid").exists, "the scoring command", 30)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0


def on_terminal(words: list[str], columns: int) -> tuple[str, list[str]]:
    """Output of a command on a terminal with `columns` columns: without escape codes, as text and as lines."""
    seen = b""

    def keep(terminal: int) -> bytes:
        nonlocal seen
        data = os.read(terminal, 4096)
        seen += data
        return data

    code = pty.spawn(["env", "TERM=xterm", f"COLUMNS={columns}", *words], keep)
    assert os.waitstatus_to_exitcode(code) == 0, seen
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    return text, [part for line in text.split("\n") for part in line.rstrip("\r").split("\r")]


def test_scores_stand_on_lines_of_their_own_above_the_bar(pair: tuple[str, str]) -> None:
    words = command("sweep", *pair, "--out", "out", *COMMANDS["sweep"], scorer(Path(), "print(x)"))
    text, lines = on_terminal(words, 80)
    assert sum(line.startswith("beta 0.5: score ") for line in lines) == 1, text
    assert not [line for line in lines if "sweeping" in line and "score" in line], text


def test_a_home_is_a_home_in_out_as_in_inputs(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for words in (("sweep", "--betas", "1"), ("soup", "--uniform"), ("merge", "--beta", "0.5")):
        name, *rest = words
        done = commands.run(name, *pair, *rest, "--out", f"~/{name}")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "home" / name).is_dir()
    assert not (tmp_path / "~").exists()

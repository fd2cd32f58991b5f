"""A launcher whose disk is full or whose folder is read-only: one line, never a traceback, and the right exit code.

/dev/full refuses every write with ENOSPC; /sys lets nobody make a folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.supervise.output import print_line
from launch.supervise.rank_process import Rank, RankProcess
from tests.support import commands
from tests.support.launching import ROOT, Launcher, write_recipe

SAY = "from pretrain.run.failures import say; say('the cause'); raise SystemExit(1)"


def test_the_cause_reaches_the_terminal_though_the_ranks_log_is_full(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for redirect, count in ((">/dev/full 2>&1", 0), ("", 1)):
        command = ["bash", "-c", f'exec {sys.executable} -c "{SAY}" {redirect}']
        rank = RankProcess(Rank(command, env, log))
        assert rank.process.wait() == 1
        rank.kill()
        rank.kill()
        assert rank.tail().splitlines() == ["dromos: the cause"]
        assert log.read_text().count("the cause") == count


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    logs = tmp_path / "run/masked/logs"
    logs.mkdir(parents=True)
    (logs / "rank_1.log").symlink_to("/dev/full")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left") as named:
        RankProcess(Rank(["true"], os.environ, logs / "rank_1.log"))
    assert named.value.filename == str(logs / "rank_1.log")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    run = commands.run("run", str(recipe), "--ranks-per-node", "2")
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"dromos: {logs}/rank_1.log: no space left on the disk")
    assert "Traceback" not in run.stdout


def test_a_run_folder_that_cannot_be_made_is_the_users(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = commands.run("run", str(recipe), "run.dir=/sys/dromos/run")
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("dromos: /sys/dromos")
    assert "(run.dir=NEW" in line


def to_dev_full(recipe: str) -> int:
    """Runs in a process: a launcher whose output is on a full disk."""
    from tests.support.launching import run_standin

    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    return run_standin(recipe, "masked")


def test_a_run_goes_on_though_its_own_output_is_full(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    env = {**os.environ, "STANDIN_STEPS": "20", "STANDIN_SECONDS": "0"}
    process = commands.Command(__name__, "to_dev_full", [str(recipe)], ROOT, env)
    Launcher.started.append(process)
    _, err = process.communicate()
    assert (tmp_path / "run/masked/result.json").exists(), err
    assert "masked: 2 ranks, logs in" in err  # stdout is full, stderr is not


def test_a_command_whose_output_is_full_says_so_and_ends_with_1(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = [sys.executable, "-P", "-m", "launch.cli", "recipe", "show", str(recipe)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no space left on the disk" in line


def test_a_line_that_no_file_takes_is_lost_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        print_line(Console(file=full), "a line")
        os.dup2(os.open("/dev/null", os.O_WRONLY), full.fileno())

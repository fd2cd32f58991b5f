"""One launch at a time in a run folder: a second one is refused before it writes, a dead one blocks nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.errors import UserError
from launch.job import StageJob
from launch.ray import driver
from launch.run import make_job, run
from launch.run_lock import check_free, run_lock
from launch.slurm import job_step
from launch.slurm.sbatch import render
from pretrain.recipe.load import load_recipe
from pretrain.run import lock
from pretrain.run.lock import FolderLock
from tests.launch.slurm.test_script import job as slurm_job
from tests.support import commands
from tests.support.fake_slurm import FakeSlurm
from tests.support.launching import Launcher, alive, wait_for, write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def contents(folder: Path, *without: str) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in without}


def test_a_second_launch_is_refused_before_it_touches_anything(recipe: Path) -> None:
    first = Launcher(recipe)
    logs = [first.run / f"masked/logs/rank_{rank}.log" for rank in (0, 1)]
    wait_for(lambda: first.steps("masked") > 2, "three steps")
    wait_for(
        lambda: all(f"rank {rank} of 2" in log.read_text() for rank, log in enumerate(logs)), "both ranks"
    )
    before = contents(first.run, "metrics.jsonl")
    second = commands.run("run", str(recipe), "optimizer.lr=0.5", "--ranks-per-node", "4")
    assert second.returncode == 2
    assert second.stdout == ""
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"dromos: {first.run} is being written by dromos run, pid {first.process.pid} on ")
    assert f"on {socket.gethostname()} since {time.strftime('%Y', time.gmtime())}-" in line
    for word in (f"dromos status {first.run}", f"kill {first.process.pid}", "another run.dir"):
        assert word in line
    assert contents(first.run, "metrics.jsonl") == before
    first.process.send_signal(signal.SIGTERM)  # as the message says
    assert first.end()[0] == 75
    assert (first.run / ".lock").read_text() == ""


def test_of_launches_at_the_same_instant_exactly_one_wins(recipe: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    launchers = [Launcher(recipe, "masked", STANDIN_GATE=str(gate)) for _ in range(6)]
    wait_for(lambda: len(list(gate.iterdir())) == 6, "all launchers")
    (gate / "open").touch()
    wait_for(lambda: sum(each.process.poll() is None for each in launchers) <= 1, "the others to end")
    (winner,) = [each for each in launchers if each.process.poll() is None]
    for rank in (0, 1):  # a rank that has not started dies of the signal
        winner.rank("masked", rank)
    wait_for(lambda: winner.steps("masked") > 0, "a step")
    winner.process.send_signal(signal.SIGINT)
    code, output = winner.end()
    assert (code, "saved and stopped" in output) == (75, True), output
    for each in launchers:
        if each is not winner:
            code, output = each.end()
            assert code == 2
            assert f"is being written by dromos run, pid {winner.process.pid} on " in output
    for rank in (0, 1):  # one start each
        assert (winner.run / f"masked/logs/rank_{rank}.log").read_text().count("--- ") == 1


def test_a_killed_launch_blocks_nothing_and_is_told(recipe: Path) -> None:
    first = Launcher(recipe, "masked")
    wait_for(lambda: first.steps("masked") > 0, "a step")
    first.process.kill()
    first.process.wait()
    code, output = Launcher(recipe, "masked", STANDIN_STEPS="3", STANDIN_SECONDS="0").end()
    assert code == 0, output
    told = f"the launch before (dromos run, pid {first.process.pid} on {socket.gethostname()} since "
    assert told in output
    assert "its lock does not count any more" in output
    again = Launcher(recipe, "masked", STANDIN_STEPS="3", STANDIN_SECONDS="0").end()[1]
    assert "the launch before" not in again


RECORD = {
    "pid": "1",
    "host": socket.gethostname(),
    "started": "2026-01-02 03:04:05 UTC",
    "boot": lock.boot_id(),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),  # process 1 runs
        ({"pid": "4194303"}, ["It has ended, but a process that it started holds the lock: fuser -v "]),
        ({"boot": "an earlier one"}, ["That machine has started again since: delete ", "/.lock"]),
        ({"host": "node7"}, ["pid 1 on node7 since 2026-01-02", "gone for good, delete ", "/.lock"]),
        ({"pid": None}, ["an unknown process", "If no process writes there, delete "]),
    ],
)
def test_what_to_do_about_a_lock_whose_holder_may_be_gone(
    tmp_path: Path, change: dict[str, str | None], words: list[str]
) -> None:
    held = FolderLock(tmp_path)
    record = {name: value for name, value in {**RECORD, **change}.items() if value is not None}
    (tmp_path / ".lock").write_text(json.dumps(record))
    for _ in range(2):
        with pytest.raises(UserError) as refused:
            lock.check_unlocked(tmp_path)
        for word in words:
            assert word in str(refused.value)
        advice = [word for word in ("delete", "fuser") if word in str(refused.value)]
        assert bool(advice) == bool(words)
    (tmp_path / ".lock").unlink()  # as the message says
    lock.check_unlocked(tmp_path)
    second = FolderLock(tmp_path, wait=0)
    held.release()  # of a file that is gone
    with pytest.raises(UserError):
        FolderLock(tmp_path, wait=0)
    second.release()


def test_a_rank_without_a_launcher_is_live_too(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    job = make_job(loaded, str(recipe))
    rank = FolderLock(job.folder / "tuned")
    with pytest.raises(UserError, match=f"run/tuned is being written by pid {os.getpid()} on "):
        check_free(job)
    with pytest.raises(UserError), run_lock(job, Console()):
        raise AssertionError
    assert not (job.folder / ".lock").exists()
    rank.release()
    check_free(job)


def test_a_refused_launch_leaves_no_folder(recipe: Path) -> None:
    job = make_job(load_recipe(recipe), str(recipe))
    with suppress(KeyError), run_lock(job, Console()):
        assert (job.folder / ".lock").exists()
        raise KeyError
    assert not job.folder.exists()


# Slurm


@pytest.fixture
def slurm(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs ahead of PATH; the recipe is in the working directory."""
    (recipe.parent / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{recipe.parent / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(recipe.parent)
    return recipe.parent / "bin"


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


SHOWN = "JobId=7 JobName=x JobState=STATE Reason=None SubmitTime=2026-01-02T03:04:05 StartTime=2026-01-02T04:00:00"


@pytest.mark.parametrize("on", ["slurm", "local"])
@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("PENDING", "(pending, submitted 2026-01-02T03:04:05)"),
        ("RUNNING", "(running, submitted 2026-01-02T03:04:05, started 2026-01-02T04:00:00, on n3)"),
        ("SUSPENDED", "(suspended, "),
    ],
)
def test_a_folder_of_a_job_in_the_queue_is_refused(
    recipe: Path, slurm: Path, on: str, state: str, told: str
) -> None:
    program(slurm, "sbatch", "echo x >> calls; echo 7")
    host = " BatchHost=n3" if state != "PENDING" else ""
    program(slurm, "scontrol", f'[ "$*" = "show job -o 7" ] && echo "{SHOWN.replace("STATE", state)}{host}"')
    assert run(str(recipe), on="slurm", ranks_per_node=1) == 0
    before = contents(recipe.parent / "run")
    with pytest.raises(UserError) as refused:
        run(str(recipe), on=on, ranks_per_node=1, overrides=["optimizer.lr=0.5"])
    folder = recipe.parent / "run"
    for word in (f"{folder} belongs to Slurm job 7 {told}", "squeue --jobs 7", f"tail -f {folder}/slurm-7.log",
                 "scancel 7", "another run.dir"):  # fmt: skip
        assert word in str(refused.value)
    assert contents(folder) == before
    assert (recipe.parent / "calls").read_text() == "x\n"


@pytest.mark.parametrize(
    "answer", [SHOWN.replace("STATE", "COMPLETED"), SHOWN.replace("STATE", "TIMEOUT"), ""]
)
def test_an_ended_or_forgotten_job_is_followed_by_the_next(recipe: Path, slurm: Path, answer: str) -> None:
    program(slurm, "sbatch", "echo x >> calls; echo $(wc -l < calls)")
    program(slurm, "scontrol", f'echo "{answer}"')
    for number in ("1", "2"):
        assert run(str(recipe), on="slurm", ranks_per_node=1) == 0
        assert json.loads((recipe.parent / "run/job.json").read_text())["job_id"] == number


def test_of_submissions_at_the_same_instant_exactly_one_is_queued(recipe: Path, slurm: Path) -> None:
    program(slurm, "sbatch", "echo x >> calls; echo 7")
    program(slurm, "scontrol", f"""echo "{SHOWN.replace("STATE", "PENDING")}" """)
    submissions = [
        commands.start("run", str(recipe), "--on", "slurm", "--ranks-per-node", "1") for _ in range(5)
    ]
    outputs = [each.communicate() for each in submissions]
    assert sorted(each.wait() for each in submissions) == [0, 2, 2, 2, 2]
    assert (recipe.parent / "calls").read_text() == "x\n"
    for (out, err), each in zip(outputs, submissions, strict=True):
        if each.wait() == 2:
            assert out == ""
            assert re.search(r"belongs to Slurm job 7|is being written by dromos run, pid \d+ on ", err), err


def test_a_slurm_job_holds_the_lock_as_long_as_its_script_runs(tmp_path: Path) -> None:
    fake = FakeSlurm(tmp_path)
    made = slurm_job(fake, (StageJob("masked", "train", 5),))
    ask = (
        "import sys\nfrom pathlib import Path\nfrom pretrain.run.lock import check_unlocked\n"
        "try: check_unlocked(Path(sys.argv[1]))\nexcept ValueError as error: print(error)"
    )
    (tmp_path / "ask.py").write_text(ask)
    fake.on("train", "masked", f"{sys.executable} ask.py runs/small > asked")
    done = fake.run(render(made))
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    batch = (tmp_path / "batch").read_text().strip()
    assert asked.startswith(
        f"runs/small is being written by Slurm job 7, pid {batch} on {socket.gethostname()} since "
    )
    assert f"tail -f {tmp_path}/runs/small/slurm-7.log" in asked
    assert "scancel 7" in asked
    assert not re.search("delete|fuser", asked)
    FolderLock(tmp_path / "runs/small", wait=0).release()


def test_a_slurm_job_whose_folder_is_in_use_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_step, "WAIT_SECONDS", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    held = FolderLock(tmp_path, about={"what": "dromos run"})
    with open(tmp_path / ".lock", "a+") as file:
        assert job_step.main(["lock", str(file.fileno()), str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"dromos: {tmp_path} is being written by dromos run, pid {os.getpid()} on ")
        held.release()
        assert job_step.main(["lock", str(file.fileno()), str(tmp_path)]) == 0
        with pytest.raises(UserError, match="Slurm job 8"):
            FolderLock(tmp_path, wait=0)
    FolderLock(tmp_path, wait=0).release()


# Ray


def test_a_driver_whose_folder_is_in_use_writes_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "WAIT_SECONDS", 0)
    loaded = load_recipe(recipe)
    job = dataclasses.replace(make_job(loaded, str(recipe), on="ray"), job_id="small-2")
    held = FolderLock(job.folder, about={"what": "Ray job small-1"})
    with pytest.raises(UserError, match="is being written by Ray job small-1, pid "):
        driver.run(job, loaded, Console())
    assert [path.name for path in job.folder.iterdir()] == [".lock"]
    held.release()


def test_a_launcher_gives_its_lock_to_no_child(recipe: Path) -> None:
    """A process that outlives the launcher would hold the lock for it."""
    job = make_job(load_recipe(recipe), str(recipe))
    with run_lock(job, Console()):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        assert alive(child.pid)
        FolderLock(job.folder, wait=0).release()
    finally:
        child.kill()
        child.wait()

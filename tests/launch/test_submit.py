"""Submission to Slurm, with scripts in place of sbatch and scontrol: the recipe a job reads, and the messages."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shlex
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from data_pipeline.errors import UserError
from launch.job import Job
from launch.ray.submit import MAX_ENV_BYTES, PAYLOAD, read_payload, submission
from launch.run import make_job, run
from launch.run_folder import open_run
from launch.slurm import sbatch
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import TrainStage
from pretrain.run.failures import RunStopped
from tests.support.launching import write_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the working directory, and a bin folder ahead of PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def program(recipe: Path, name: str, body: str) -> None:
    path = recipe.parent / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def keep_scripts(recipe: Path) -> None:
    """An sbatch that keeps a copy of the script at submission, as Slurm's does."""
    program(
        recipe,
        "sbatch",
        'number=$(ls queue.* 2>/dev/null | wc -l)\ncp "${@: -1}" queue.$number\necho $number',
    )


def queued(recipe: Path, number: int) -> list[str]:
    """Words of the line in a queued script that starts the first stage's ranks."""
    lines = (recipe.parent / f"queue.{number}").read_text().splitlines()
    return shlex.split(next(line for line in lines if "launch.cli train" in line).partition(" || ")[0])


def rate(recipe_path: str) -> float:
    stage = load_recipe(recipe_path).stages["masked"]
    assert isinstance(stage, TrainStage)
    return stage.optimizer.lr or 0


def test_a_queued_slurm_job_keeps_its_recipe(recipe: Path) -> None:
    keep_scripts(recipe)
    assert run(str(recipe), on="slurm", ranks_per_node=1, overrides=["optimizer.lr=1e-4"]) == 0
    assert run(str(recipe), on="slurm", ranks_per_node=1, overrides=["optimizer.lr=2e-4"]) == 0
    for number, lr in enumerate((1e-4, 2e-4)):
        words = queued(recipe, number)
        path = words[words.index("train") + 1]
        assert rate(path) == lr
        script = (recipe.parent / f"queue.{number}").read_text()
        assert f"launch.slurm.job_step state {path} masked" in script
    assert rate("run/recipe.yaml") == 2e-4


def test_a_waiting_ray_job_keeps_its_recipe(recipe: Path) -> None:
    jobs: list[Job] = []
    for rate_given in ("1e-4", "2e-4"):
        loaded = load_recipe(recipe, [f"optimizer.lr={rate_given}"])
        jobs.append(make_job(loaded, str(recipe), on="ray", ranks_per_node=1))
        open_run(jobs[-1], loaded)
    for job, lr in zip(jobs, (1e-4, 2e-4), strict=True):
        command = job.train_command("masked")
        assert rate(command[command.index("train") + 1]) == lr


def with_classes(recipe: Path, name: str, names: list[str]) -> None:
    """Add a zero-shot evaluation with one class per name, of many long names."""
    classes = "".join(f"        '{number}': {text}\n" for number, text in enumerate(names))
    task = f"path: {recipe.parent / 'data'}\n      templates: ['{{}}']\n      classes:\n{classes}"
    recipe.write_text(
        recipe.read_text().partition("eval:")[0] + f"eval:\n  zero_shot:\n    {name}:\n      {task}"
    )


def test_a_large_recipe_reaches_the_driver_of_a_ray_job(recipe: Path) -> None:
    with_classes(recipe, "words", [f"{'a thing called ' * 20}{number}" for number in range(450)])
    loaded = load_recipe(recipe)
    text = dump(loaded)
    assert len(text) > 131072
    job = make_job(loaded, str(recipe), on="ray", ranks_per_node=1)
    payload = submission(job, text)["runtime_env"]["env_vars"][PAYLOAD]
    assert subprocess.run(["true"], env={PAYLOAD: payload}).returncode == 0  # the kernel takes it
    assert read_payload(payload) == (job, text)
    noise = "".join(secrets.token_hex(32) for _ in range(4000))
    with pytest.raises(UserError, match=f"at most {MAX_ENV_BYTES:,}"):
        submission(job, noise)


def answers(recipe: Path, *states: str, code: str = "0:0") -> None:
    """An scontrol that answers with these states, one per call; `-` is an error, as is every call after the last."""
    program(
        recipe,
        "scontrol",
        f"states=({' '.join(states)})\ncount=$(cat calls 2>/dev/null || echo 0)\necho $((count + 1)) > calls\n"
        'state=${states[$count]:--}\n[ "$state" = - ] && { echo "slurm_load_jobs error" >&2; exit 1; }\n'
        '[ "$*" = "show job -o 7" ] || exit 1\n'
        f'echo "JobId=7 JobName=x Reason=None JobState=$state Requeue=1 DerivedExitCode=9:0 ExitCode={code}"',
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record sleeps instead of sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(sbatch, "time", SimpleNamespace(sleep=slept.append))
    return slept


WAITED = "PENDING CONFIGURING RUNNING RUNNING COMPLETING REQUEUED PENDING RUNNING SUSPENDED STAGE_OUT"
END_CODES = [
    ("COMPLETED", "0:0", 0),
    ("FAILED", "2:0", 2),  # the user's input
    ("FAILED", "75:0", 75),  # saved, but not requeued
    ("FAILED", "1:0", 1),
    ("FAILED", "127:0", 1),
    ("TIMEOUT", "0:0", 1),
    ("CANCELLED", "75:0", 75),
    ("CANCELLED", "0:15", 1),
    ("NODE_FAIL", "1:0", 1),
    ("OUT_OF_MEMORY", "0:125", 1),
    ("PREEMPTED", "0:15", 1),
    ("BOOT_FAIL", "0:0", 1),
    ("DEADLINE", "0:0", 1),
]


@pytest.mark.parametrize(("state", "code", "exit_code"), END_CODES)
def test_wait_follows_a_job_through_requeues_and_ends_as_it_does(
    recipe: Path,
    quick: list[float],
    capsys: pytest.CaptureFixture[str],
    state: str,
    code: str,
    exit_code: int,
) -> None:
    """All job states of squeue(1) that are not an end are waited through."""
    program(recipe, "sbatch", "echo '7;some-cluster'")
    states = WAITED.split()
    answers(recipe, *states, state, code=code)
    assert run(str(recipe), on="slurm", ranks_per_node=1, wait=True) == exit_code
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("job 7: ")]
    changes = [name for name, before in zip(states, ["", *states], strict=False) if name != before]
    assert told == [f"job 7: {name.lower()}" for name in (*changes, state)]
    assert quick == [2] * len(states)


@pytest.mark.parametrize("inside", [False, True])
def test_sbatch_gets_what_the_dry_run_prints_and_the_folder_has_the_jobs_number(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], inside: bool
) -> None:
    """Submitted from inside a job, the new job does not inherit the options of that job."""
    program(
        recipe,
        "sbatch",
        'printf "%s\\n" "$@" > arguments; cp "${@: -1}" seen; env > env; echo "7;some-cluster"',
    )
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("MY_SLURM_NOTES", "kept")
    for name in ("SLURM_NTASKS", "SRUN_DEBUG", "PMI_RANK", *(["SLURM_JOB_ID"] if inside else [])):
        monkeypatch.setenv(name, "1")
    flags = {"on": "slurm", "ranks_per_node": 2, "nodes": 2, "overrides": ["run.name=a b"]}
    assert run(str(recipe), **flags, dry_run=True) == 0  # type: ignore[arg-type]
    dry = capsys.readouterr().out
    assert not (recipe.parent / "run").exists()
    assert run(str(recipe), **flags) == 0  # type: ignore[arg-type]
    folder = recipe.parent / "run"
    assert (recipe.parent / "arguments").read_text().splitlines() == [
        "--parsable",
        str(folder / "job.sbatch"),
    ]
    assert (recipe.parent / "seen").read_text() == dry == (folder / "job.sbatch").read_text()
    passed = (recipe.parent / "env").read_text().splitlines()
    outer = {"SBATCH_ACCOUNT=mine", "SLURM_NTASKS=1", "SRUN_DEBUG=1", "PMI_RANK=1"}
    assert outer & set(passed) == (set() if inside else outer)
    assert "MY_SLURM_NOTES=kept" in passed
    loaded = load_recipe(recipe, ["run.name=a b"])
    wanted = make_job(loaded, str(recipe), "slurm", None, 2, 2, None, ["run.name=a b"])
    assert Job.from_json((folder / "job.json").read_text()) == dataclasses.replace(wanted, job_id="7")
    assert capsys.readouterr().out.splitlines() == [
        f"submitted job 7: 2 x 2 ranks, {folder}/job.sbatch",
        f"log: {folder}/slurm-7.log",
        f"ranks: {folder}/masked/logs/rank_N.log",
        f"ranks: {folder}/tuned/logs/rank_N.log",
    ]


def test_without_sbatch_nothing_is_written(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(recipe.parent / "bin"))
    with pytest.raises(UserError, match="sbatch is not installed on this machine; submit from a login node"):
        run(str(recipe), on="slurm", ranks_per_node=1)
    assert not (recipe.parent / "run").exists()


def wait(recipe: Path) -> int:
    return sbatch.wait_for("7", make_job(load_recipe(recipe), str(recipe), on="slurm"), Console())


def test_a_controller_that_is_busy_is_asked_again(
    recipe: Path, quick: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(recipe, "RUNNING", "-", "-", "RUNNING", "-", "-", "-", "-", "-", "COMPLETED")
    assert wait(recipe) == 0
    assert quick == [2, 2, 4, 2, 2, 4, 8, 16, 32]
    assert capsys.readouterr().out == "job 7: running\njob 7: completed\n"


def test_a_job_that_slurm_has_forgotten_is_told_in_words(
    recipe: Path, quick: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(recipe, "RUNNING")
    assert wait(recipe) == 1
    assert sum(quick) > 60
    assert f"see how it ended in {recipe.parent}/run/slurm-7.log" in capsys.readouterr().out


def test_to_stop_waiting_is_not_to_be_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 75 would mean that the job saved and stopped, but it still runs."""
    answers(recipe, "RUNNING")
    monkeypatch.setattr(sbatch.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
    assert wait(recipe) == 1
    assert "job 7 continues to run; `scancel 7` ends it" in capsys.readouterr().out


def test_a_refused_job_leaves_the_folder_as_it_was(recipe: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path("deep").rglob("*") if path.is_file()}

    refuse = "echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1"
    program(recipe, "sbatch", refuse)
    flags = {"on": "slurm", "ranks_per_node": 1}
    with pytest.raises(UserError, match=r"sbatch refused the job .*\n.*invalid partition"):
        run(str(recipe), **flags, overrides=["run.dir=deep/run"])  # type: ignore[arg-type]
    assert not Path("deep").exists()
    keep_scripts(recipe)
    assert run(str(recipe), **flags, overrides=["run.dir=deep/run"]) == 0  # type: ignore[arg-type]
    before = files()
    assert len(before) == 6
    program(recipe, "sbatch", refuse)
    with pytest.raises(UserError, match="sbatch refused"):
        run(str(recipe), **flags, overrides=["run.dir=deep/run", "optimizer.lr=5e-4"])  # type: ignore[arg-type]
    assert files() == before


@pytest.fixture
def unwritable_record(recipe: Path) -> Path:
    """An sbatch that accepts job 7 and puts a folder in the place of job.json, and an scancel that keeps its arguments.

    Returns the run folder, which an earlier submission has filled.
    """
    keep_scripts(recipe)
    assert run(str(recipe), on="slurm", ranks_per_node=1) == 0
    program(recipe, "sbatch", "rm run/job.json; mkdir run/job.json; echo 7")
    program(recipe, "scancel", 'echo "$@" >> cancelled')
    return recipe.parent / "run"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_accepted_job_that_cannot_be_recorded_is_cancelled(recipe: Path, unwritable_record: Path) -> None:
    before = names(unwritable_record)
    with pytest.raises(RunStopped) as told:
        run(str(recipe), on="slurm", ranks_per_node=1, overrides=["optimizer.lr=5e-4"])
    assert str(told.value).startswith(f"{unwritable_record}/job.json: Is a directory")
    assert "Slurm had accepted job 7; it was cancelled" in str(told.value)
    assert (recipe.parent / "cancelled").read_text() == "7\n"
    assert names(unwritable_record) == before  # without the new copy of the recipe
    assert rate("run/recipe.yaml") == 1e-3


@pytest.mark.parametrize("scancel", ["exit 1", None])
def test_an_accepted_job_that_can_be_neither_recorded_nor_cancelled_is_named_and_keeps_its_files(
    recipe: Path, unwritable_record: Path, monkeypatch: pytest.MonkeyPatch, scancel: str | None
) -> None:
    if scancel:
        program(recipe, "scancel", scancel)
    else:
        (recipe.parent / "bin/scancel").unlink()
        monkeypatch.setenv("PATH", f"{recipe.parent / 'bin'}:/nowhere")
        program(recipe, "sbatch", "/bin/rm run/job.json; /bin/mkdir run/job.json; echo 7")
    before = names(unwritable_record)
    with pytest.raises(RunStopped) as told:
        run(str(recipe), on="slurm", ranks_per_node=1, overrides=["optimizer.lr=5e-4"])
    for words in ("accepted job 7, and scancel failed", "scancel 7", f"start nothing in {unwritable_record}"):
        assert words in str(told.value)
    (copy,) = names(unwritable_record) - before
    assert rate(f"run/{copy}") == rate("run/recipe.yaml") == 5e-4


@pytest.mark.parametrize("scancel", ["exit 0", "exit 1"])
def test_the_lock_of_an_accepted_job_is_not_taken_from_it(recipe: Path, scancel: str) -> None:
    """A job that started has opened the file of the first submission: its lock must count for the next launch."""
    start = "exec 8<>run/.lock; sleep 600 8<&8 >/dev/null 2>&1 & echo $! > job"
    program(recipe, "sbatch", f"{start}; rm run/job.json; mkdir run/job.json; echo 7")
    program(recipe, "scancel", scancel)
    with pytest.raises(RunStopped):
        run(str(recipe), on="slurm", ranks_per_node=1)
    job = int((recipe.parent / "job").read_text())
    try:
        lock = (recipe.parent / "run/.lock").stat()
        opened = os.stat(f"/proc/{job}/fd/8")
        assert (lock.st_dev, lock.st_ino) == (opened.st_dev, opened.st_ino)
    finally:
        os.kill(job, signal.SIGKILL)


def test_ctrl_c_between_sbatch_and_the_record_cancels_the_job(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(recipe, "sbatch", "echo 7")
    program(recipe, "scancel", 'echo "$@" >> cancelled')
    published = sbatch.publish

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == "job.json":
            raise KeyboardInterrupt
        published(path, content)

    monkeypatch.setattr(sbatch, "publish", interrupted)
    with pytest.raises(RunStopped, match=r"^interrupted\. Slurm had accepted job 7; it was cancelled"):
        run(str(recipe), on="slurm", ranks_per_node=1)
    assert (recipe.parent / "cancelled").read_text() == "7\n"

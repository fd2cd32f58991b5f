"""The local backend: environment of ranks, order of stages, signals, failures, and no process left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import local
from launch.job import Job
from launch.run import make_job
from launch.stage_state import StageStates, stage_job
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from tests.support.launching import Launcher, alive, wait_for, write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def test_stages_run_in_order_and_done_ones_are_skipped(recipe: Path) -> None:
    first = Launcher(recipe, STANDIN_STEPS="20", STANDIN_SECONDS="0")
    code, output = first.end()
    assert code == 0, output
    assert output.index("masked:") < output.index("tuned:")
    assert first.steps("masked") == 20
    assert first.rank("masked", 0)["pid"] != first.rank("tuned", 0)["pid"]
    again = Launcher(recipe, STANDIN_FAIL="0:1")
    code, output = again.end()
    assert code == 0, output
    assert "masked: done" in output
    assert "tuned: done" in output
    assert again.steps("masked") == 20


def test_a_longer_length_runs_a_finished_stage_again(recipe: Path) -> None:
    assert Launcher(recipe, "masked", STANDIN_STEPS="20", STANDIN_SECONDS="0").end()[0] == 0
    recipe.write_text(recipe.read_text().replace("train: {steps: 20}", "train: {steps: 30}"))
    longer = Launcher(recipe, "masked", STANDIN_STEPS="30", STANDIN_SECONDS="0")
    assert longer.end()[0] == 0
    assert json.loads((longer.run / "masked" / "result.json").read_text()) == {"step": 30}


def made(recipe: Path, ranks: int, gpus: int, **values: Any) -> Job:
    """The local job of the recipe; its Python is the script `python` beside the recipe."""
    job = make_job(
        load_recipe(recipe), str(recipe), ranks_per_node=ranks, overrides=["train.steps=7", "run.name=a b"]
    )
    return dataclasses.replace(
        job, gpus_per_node=gpus, python=str(recipe.parent / "py thon"), env={"X": "1 '2'"}, **values
    )


def record_ranks(recipe: Path) -> None:
    """A Python that records a rank's environment and arguments, and ends with 0."""
    path = recipe.parent / "py thon"
    folder = shlex.quote(str(recipe.parent))
    path.write_text(f'#!/bin/bash\nenv -0 > {folder}/$RANK.env\nprintf "%s\\0" "$@" > {folder}/$RANK.argv\n')
    path.chmod(0o755)


def recorded(recipe: Path, rank: int) -> tuple[dict[str, str], list[str]]:
    env, argv = ((recipe.parent / f"{rank}.{kind}").read_text().split("\0")[:-1] for kind in ("env", "argv"))
    return dict(pair.split("=", 1) for pair in env), argv


@pytest.mark.parametrize("how", ["run", "pasted from the dry run"])
@pytest.mark.parametrize(
    ("gpus", "given"), [(0, {}), (2, {}), (0, {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth7"})]
)
def test_every_rank_gets_its_own_place(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, gpus: int,
    given: dict[str, str],
) -> None:  # fmt: skip
    """The ranks that `local.run` starts, and those of the printed commands, which bash runs."""
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, "WORLD_SIZE": "9", "X": "of the user"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local, "core_count", lambda: 7)
    record_ranks(recipe)
    job = made(recipe, 2, gpus)
    if how == "run":
        states = StageStates(frozenset(), job.stages[:1])
        assert local.run(job, load_recipe(recipe), states, Console()) == 0
        assert "masked: 2 ranks" in capsys.readouterr().out
    else:
        text = local.render(dataclasses.replace(job, stages=job.stages[:1]))
        assert text.count("FREE_PORT") == 2
        subprocess.run(["bash", "-e", "-c", text.replace("FREE_PORT", "29500")], check=True)
    ports = set()
    for rank in (0, 1):
        env, argv = recorded(recipe, rank)
        ports.add(env.pop("MASTER_PORT"))
        wanted = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONUNBUFFERED": "1",
            "X": "1 '2'",
            "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", "3"),  # of 7 cores
            "DS_ACCELERATOR": None if gpus else "cpu",
            "GLOO_SOCKET_IFNAME": given.get("GLOO_SOCKET_IFNAME", None if gpus else "lo"),
        }
        assert {name: env.get(name) for name in wanted} == wanted
        assert argv == ["-P", "-m", "launch.cli", "train", str(recipe), "--stage", "masked", *job.overrides]
    (port,) = ports
    assert 1024 <= int(port) < 65536


def test_a_rank_gets_a_thread_even_where_there_are_more_ranks_than_cores(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "core_count", lambda: 2)
    assert local.rank_env(made(recipe, 3, 0), 0, 1, {})["OMP_NUM_THREADS"] == "1"


def test_the_dry_run_names_every_stage(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "  mix: {kind: merge, inputs: {masked: 0.4, tuned: 0.6}}\n")
    lines = local.render(made(recipe, 1, 0)).splitlines()
    run = recipe.parent / "run"
    assert [line for line in lines if line.startswith("#")] == [
        f"# masked: training in {run}/masked, 1 rank",
        f"# tuned: training in {run}/tuned, 1 rank",
        f"# mix: merge into {run}/mix/weights, in this process",
    ]
    assert [shlex.split(line)[-3] for line in lines if not line.startswith("#")] == ["masked", "tuned"]


def test_a_run_folder_says_what_ran(recipe: Path) -> None:
    record_ranks(recipe)
    job, loaded = made(recipe, 1, 0), load_recipe(recipe, ["train.steps=7"])
    assert local.run(job, loaded, StageStates(frozenset(), job.stages), Console()) == 0
    folder = recipe.parent / "run"
    assert dump(load_recipe(folder / "recipe.yaml")) == dump(loaded)
    assert Job.from_json((folder / "job.json").read_text()) == job
    assert json.loads((folder / "env.json").read_text())["cores"] == len(os.sched_getaffinity(0))
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "env.json", "job.json", "masked", "recipe.yaml", "tuned",
    ]  # fmt: skip


def test_nothing_is_started_nor_written_when_all_is_done(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = made(recipe, 1, 0)
    states = StageStates(frozenset(stage.name for stage in job.stages), ())
    assert local.run(job, load_recipe(recipe), states, Console()) == 0
    printed = capsys.readouterr().out
    assert printed == "".join(f"{name}: done ({recipe.parent}/run/{name})\n" for name in ("masked", "tuned"))
    assert not (recipe.parent / "run").exists()


def test_a_loader_on_ray_tells_the_ranks_the_address(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster that is named; tests/launch/ray/test_process.py has a Ray of the job's own."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    record_ranks(recipe)
    for backend, address in (("local", None), ("ray", "head:6379")):
        loaded = load_recipe(recipe, [f"loader.backend={backend}"])
        job = made(recipe, 1, 0, cluster={"gcs_address": "head:6379"})
        job = dataclasses.replace(job, stages=(stage_job(loaded, "masked"),))
        assert local.run(job, loaded, StageStates(frozenset(), job.stages), Console()) == 0
        assert recorded(recipe, 0)[0].get("RAY_ADDRESS") == address


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(recipe: Path, number: signal.Signals) -> None:
    launcher = Launcher(recipe)
    for rank in (0, 1):  # a rank that has not started dies of the signal
        launcher.rank("masked", rank)
    wait_for(lambda: launcher.steps("masked") > 2, "three steps")
    launcher.process.send_signal(number)
    code, output = launcher.end()
    assert code == 75, output
    assert f"saved and stopped on {number.name}" in output
    assert f"to resume: dromos run {recipe} --stage masked,tuned --ranks-per-node 2" in output
    saved = int((launcher.run / "masked" / "saved").read_text())
    assert saved == launcher.steps("masked")
    assert not (launcher.run / "tuned").exists()
    rerun = Launcher(recipe, "masked", STANDIN_STEPS=str(saved + 5))
    assert rerun.end()[0] == 0
    steps = [json.loads(row)["step"] for row in (rerun.run / "masked/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved + 6))


def test_a_second_ctrl_c_kills(recipe: Path) -> None:
    launcher = Launcher(recipe, STANDIN_SAVE_SECONDS="600")
    pids = [launcher.rank("masked", rank)[key] for rank in (0, 1) for key in ("pid", "worker")]
    wait_for(lambda: launcher.steps("masked") > 0, "a step")
    launcher.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.process.poll() is None
    launcher.process.send_signal(signal.SIGINT)
    code, output = launcher.end()
    assert code == 1
    assert "killed before the save ended" in output
    wait_for(lambda: not any(map(alive, pids)), "ranks and their workers to end")


def test_ctrl_c_in_a_terminal_reaches_the_launcher_alone(recipe: Path) -> None:
    """It goes to the whole process group; ranks and their workers get the launcher's one SIGTERM instead."""
    launcher = Launcher(recipe, "masked", STANDIN_SESSION="1")
    reports = [launcher.rank("masked", rank) for rank in (0, 1)]
    wait_for(lambda: launcher.steps("masked") > 0, "a step")
    group = os.getpgid(launcher.process.pid)
    assert group == launcher.process.pid
    assert not {os.getpgid(report[key]) for report in reports for key in ("pid", "worker")} & {group}
    os.killpg(group, signal.SIGINT)
    code, output = launcher.end()
    assert code == 75, output
    assert "saved and stopped on SIGINT" in output
    for rank in (0, 1):
        assert (launcher.run / "masked" / f"signals_{rank}").read_text().split() == ["SIGTERM"]
        assert "Traceback" not in (launcher.run / "masked" / "logs" / f"rank_{rank}.log").read_text()
    wait_for(lambda: not any(alive(report["worker"]) for report in reports), "workers to end")


def test_kill_9_of_the_launcher_leaves_nothing_alive(recipe: Path) -> None:
    launcher = Launcher(recipe)
    pids = [launcher.rank("masked", rank)[key] for rank in (0, 1) for key in ("pid", "worker")]
    wait_for(lambda: launcher.steps("masked") > 0, "a step")
    assert all(map(alive, pids))
    launcher.process.kill()
    launcher.process.wait()
    wait_for(lambda: not any(map(alive, pids)), "ranks and their workers to end", seconds=5)


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        ("1:1", 1, ["rank 1 of 2 ended with exit code 1", "the rank failed on request"]),
        ("0:2", 2, ["rank 0 of 2 ended with exit code 2", "the rank failed on request"]),
        ("1:SIGKILL", 1, ["rank 1 of 2 ended with SIGKILL (often: out of memory)"]),
        ("0:SIGSEGV", 1, ["rank 0 of 2 ended with SIGSEGV"]),
    ],
)
def test_a_failing_rank_is_named_and_takes_the_others_along(
    recipe: Path, failure: str, code: int, words: list[str]
) -> None:
    launcher = Launcher(recipe, STANDIN_FAIL=failure)
    pids = [launcher.rank("masked", rank)[key] for rank in (0, 1) for key in ("pid", "worker")]
    got, output = launcher.end()
    assert got == code, output
    for word in [*words, "masked/logs/rank_"]:
        assert word in output
    wait_for(lambda: not any(map(alive, pids)), "ranks and their workers to end")
    assert not (launcher.run / "tuned").exists()


def test_only_this_start_is_shown_of_a_log(recipe: Path) -> None:
    assert Launcher(recipe, STANDIN_FAIL="1:1").end()[0] == 1
    _, output = Launcher(recipe, STANDIN_FAIL="1:SIGKILL").end()
    assert "the rank failed on request" not in output
    assert (recipe.parent / "run/masked/logs/rank_1.log").read_text().count("rank 1 of 2") == 2

"""The local backend: environment of ranks, order of stages, signals, failures, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launch.supervise.rank_group import Outcome, first_failure, group_outcome
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


def test_environment_of_ranks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launcher = Launcher(recipe, "masked", STANDIN_STEPS="1", STANDIN_SECONDS="0")
    assert launcher.end()[0] == 0
    ranks = [launcher.rank("masked", rank)["env"] for rank in (0, 1)]
    assert [env["RANK"] for env in ranks] == ["0", "1"]
    assert [env["LOCAL_RANK"] for env in ranks] == ["0", "1"]
    assert {env["WORLD_SIZE"] for env in ranks} == {"2"}
    assert {env["MASTER_ADDR"] for env in ranks} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in ranks}) == 1
    assert {env["OMP_NUM_THREADS"] for env in ranks} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert {env["DS_ACCELERATOR"] for env in ranks} == {"cpu"}
    assert "rank 1 of 2" in (launcher.run / "masked" / "logs" / "rank_1.log").read_text()


def test_threads_that_the_user_set_stay(recipe: Path) -> None:
    launcher = Launcher(recipe, "masked", STANDIN_STEPS="1", OMP_NUM_THREADS="7")
    assert launcher.end()[0] == 0
    assert launcher.rank("masked", 0)["env"]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(recipe: Path, number: signal.Signals) -> None:
    launcher = Launcher(recipe)
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


def test_blame_and_verdict() -> None:
    assert first_failure({0: 0, 1: 75}, stopping=False) is None
    assert first_failure({0: 1, 1: -9}, stopping=False) == 1
    assert first_failure({0: 75, 1: -15}, stopping=True) is None
    assert first_failure({0: 75, 1: -15}, stopping=False) == 1
    assert group_outcome({0: 0, 1: 0}, None, False, False).code == 0
    assert group_outcome({0: 75, 1: 75}, None, False, False).code == 75
    assert group_outcome({0: 0, 1: 0}, None, True, False).code == 0  # the ranks were done before the signal
    assert group_outcome({0: 0, 1: -15}, None, True, False).code == 75
    assert group_outcome({0: -9, 1: 2}, 1, False, False) == Outcome(2, 1, {0: -9, 1: 2})

"""A full disk, a lost rank, too little memory: a rank says what, where and what to do in one line, and can go on later.

The failures are real: a small tmpfs (tests/support/small_disk.py), /dev/full, an allocation that the system refuses.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pretrain.run.folder import complete_steps
from tests.support import rank, tiny
from tests.support.forks import Fork, fork, free_port, rank_environment
from tests.support.small_disk import SmallDisk, enter

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny.make_data(folder)
    return folder


def recipe(data: Path, path: Path, run: Path, **sections: Any) -> Path:
    settings = {"train": {"steps": STEPS}, "checkpoint": {"every": 2, "keep": 2}, **sections}
    name = {"run": {"name": "flip", "dir": str(run), "seed": 3}}
    return tiny.write_recipe(path, tiny.flip_recipe(data, **settings, **name))


def start(function: str, log: Path, *arguments: Any) -> Fork:
    return fork(__name__, function, arguments, rank_environment(0, 1, free_port()), log)


def the_line(log: Path) -> str:
    """The only line of an error; the log has no traceback."""
    text = log.read_text()
    assert "Traceback" not in text
    usual = ("resumes", " trains ")
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith("dromos: ") and not any(word in line for word in usual)
    ]
    return line


def rows(stage: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in read]


# Runs in a fork.
def train_on(pid: int, full: str, path: str) -> int:
    enter(pid, full)
    from pretrain.train.main import main

    return main(path, "main")


@pytest.mark.parametrize("mount", [True, False])
def test_a_save_on_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_later(
    data: Path, tmp_path: Path, mount: bool
) -> None:
    whole = recipe(data, tmp_path / "whole.yaml", tmp_path / "whole")
    code, printed = rank.run(whole)
    assert code == 0, printed
    with SmallDisk(tmp_path / "disk", 6 << 20, mount) as disk:
        path = recipe(data, tmp_path / "r.yaml", disk.folder / "run")
        stage = disk.seen / "run/main"
        if disk.pid:
            disk.fill(1 << 20)  # room for one checkpoint, not for two
        else:  # a checkpoint, then the limit
            assert start("train_failing", tmp_path / "first.log", "stop", str(path)).code() == 75
            disk.fill(0)
        before = complete_steps(stage / "checkpoints")
        failed = start("train_on", tmp_path / "full.log", disk.pid, str(disk.full), str(path))
        assert failed.code() == 1, failed.output
        line = the_line(failed.log)
        what = (
            r"no space left on the disk \([\d,]+ bytes are free\): make room"
            if disk.pid
            else "over the limit"
        )
        assert re.search(rf"{disk.folder}/run/main/checkpoints/step_0000000\d\.tmp.*: {what}", line), line
        kept = complete_steps(stage / "checkpoints")
        assert kept == (before or [2])
        assert f"then run it again; the newest complete checkpoint, of step {kept[-1]}, is kept" in line
        assert (stage / "checkpoints/latest").read_text() == f"step_{kept[-1]:08d}"
        assert list((stage / "checkpoints").glob("step_*.tmp"))  # the half one does not count
        disk.make_room()
        again = start("train_on", tmp_path / "again.log", disk.pid, str(disk.full), str(path))
        assert again.code() == 0, again.output
        assert f"main resumes after step {kept[-1]}" in again.output
        assert rows(stage) == rows(tmp_path / "whole/main")
        assert complete_steps(stage / "checkpoints") == [6, 8]
        assert not list((stage / "checkpoints").glob("step_*.tmp"))


# Runs in a fork: `kind` fails in step 3.
def train_failing(kind: str, path: str) -> int:
    import torch

    from pretrain.train.main import main
    from pretrain.train.trainer import Trainer

    step = Trainer.step

    def failing(self: Trainer, done: int, *arguments: Any) -> Any:
        if done < 2:
            return step(self, done, *arguments)
        if kind == "gpu":
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB free."
            )
        if kind == "host":
            torch.empty(1 << 60)  # the system refuses it
        if kind == "python":
            bytearray(1 << 62)
        if kind == "deepspeed":
            self.engine._engine.optimizer.bit16_groups = None  # DeepSpeed's own state
            return step(self, done, *arguments)
        if kind == "stop":
            self.stop.signal_name = "SIGTERM"
        if kind == "bug":
            raise KeyError("a bug")
        if kind == "log":
            assert self.log is not None
            self.log.file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
        return step(self, done, *arguments)

    with mock.patch.object(Trainer, "step", failing):
        return main(path, "main")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "gpu",
            ["out of GPU memory: CUDA out of memory. Tried to allocate 20.00 GiB", "Lower train.micro_batch"],
        ),
        ("host", ["out of memory (", "allocate memory", "lower loader.workers or train.micro_batch"]),
        ("python", ["out of memory: lower loader.workers"]),
        (
            "deepspeed",
            ["TypeError when DeepSpeed reduced the gradients: ", "DROMOS_TRACEBACK=1 prints the traceback"],
        ),
        ("log", ["run/main/metrics.jsonl: no space left on the disk", "make room there"]),
    ],
)
def test_a_failure_is_one_line_with_what_to_do(
    data: Path, tmp_path: Path, kind: str, words: list[str]
) -> None:
    path = recipe(data, tmp_path / "r.yaml", tmp_path / "run")
    failed = start("train_failing", tmp_path / "log", kind, str(path))
    assert failed.code() == 1, failed.output
    line = the_line(failed.log)
    for word in (*words, "; the newest complete checkpoint, of step 2, is kept"):
        assert word in line
    assert complete_steps(tmp_path / "run/main/checkpoints") == [2]


def test_a_failure_before_the_first_checkpoint_promises_none(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path / "r.yaml", tmp_path / "run", checkpoint={"every": STEPS})
    failed = start("train_failing", tmp_path / "log", "host", str(path))
    assert failed.code() == 1, failed.output
    line = the_line(failed.log)
    assert line.endswith("; no checkpoint is complete yet")
    assert "kept" not in line
    assert complete_steps(tmp_path / "run/main/checkpoints") == []


def test_a_stage_whose_folder_cannot_be_made_says_nothing_of_checkpoints(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path / "r.yaml", Path("/sys/dromos/run"))
    failed = start("train_on", tmp_path / "log", 0, str(tmp_path / "not full"), str(path))
    assert failed.code() == 2, failed.output
    line = the_line(failed.log)
    assert line.startswith("dromos: /sys/dromos")
    assert "checkpoint" not in line


def test_a_bug_keeps_its_traceback(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path / "r.yaml", tmp_path / "run")
    failed = start("train_failing", tmp_path / "log", "bug", str(path))
    assert failed.code() == 1
    assert "KeyError: 'a bug'" in failed.output
    assert "Traceback" in failed.output


def test_the_traceback_of_an_explained_failure_can_be_had(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROMOS_TRACEBACK", "1")
    path = recipe(data, tmp_path / "r.yaml", tmp_path / "run")
    failed = start("train_failing", tmp_path / "log", "deepspeed", str(path))
    assert failed.code() == 1
    assert "Traceback" in failed.output


@pytest.mark.dist
def test_a_rank_whose_peer_dies_says_so(data: Path, tmp_path: Path) -> None:
    path = recipe(
        data, tmp_path / "r.yaml", tmp_path / "run", train={"steps": 5000}, checkpoint={"every": 5000}
    )
    ranks = rank.start_ranks(path, world=2)
    ranks[0].wait_for(lambda: (tmp_path / "run/main/metrics.jsonl").exists() and rows(tmp_path / "run/main"))
    ranks[1].send_signal(signal.SIGKILL)
    assert ranks[0].code() == 1, ranks[0].output
    line = the_line(ranks[0].log)
    assert (
        "another rank has ended or does not answer: the log of the rank that failed first has the cause"
        in line
    )
    assert ranks[1].code() == -signal.SIGKILL

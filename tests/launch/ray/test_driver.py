"""The driver of a Ray job with a stand-in for Ray: placement, what every rank gets, and how the job ends."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.job import Job
from launch.ray import driver
from launch.ray.submit import PAYLOAD, pack_payload
from launch.run import make_job
from launch.supervise import rank_group
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from tests.support.fake_ray import FakeRay
from tests.support.launching import write_recipe

# In place of a rank's Python: records its environment, arguments and folder, then does what is in the file `rank`.
# `both` waits until both ranks of a job have called it.
PYTHON = """#!/bin/bash
env -0 > {folder}/$RANK.env
printf '%s\\0' "$@" > {folder}/$RANK.argv
pwd > {folder}/$RANK.pwd
both() {{ touch $RANK.ready; until [ -e 0.ready ] && [ -e 1.ready ]; do sleep 0.01; done; }}
. {folder}/rank
"""
# A rank that stops the driver, and one that computes until it gets a signal.
STOP = "both; [ $RANK = 1 ] && kill -TERM $DRIVER; IDLE"
IDLE = "tail --pid=$$ -f /dev/null & while :; do wait; done"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, the ranks' Python, and a driver that looks at its ranks often."""
    write_recipe(tmp_path)
    (tmp_path / "rank").write_text("exit 0\n")
    (tmp_path / "python").write_text(PYTHON.format(folder=shlex.quote(str(tmp_path))))
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(driver.RayGroup, "poll_seconds", 0.02)
    monkeypatch.setattr(rank_group, "FAILURE_GRACE_SECONDS", 0.1)
    return tmp_path


def job(
    folder: Path, nodes: int, ranks: int, gpus: int = 0, stages: str = "masked", **cluster: object
) -> Job:
    recipe = load_recipe(folder / "small.yaml")
    made = make_job(recipe, "small.yaml", "ray", stages.split(), nodes, ranks)
    return dataclasses.replace(
        made,
        python=str(folder / "python"),
        workdir=str(folder / "work"),
        gpus_per_node=gpus,
        cluster={"kind": "ray", **cluster},
    )


def run(given: Job, folder: Path, patch: pytest.MonkeyPatch) -> int:
    """Run the driver as Ray's job API does: the job is in the environment."""
    patch.setenv(PAYLOAD, pack_payload(given, dump(load_recipe(folder / "small.yaml"))))
    return driver.main()


def environment(folder: Path, rank: int) -> dict[str, str]:
    pairs = (folder / f"{rank}.env").read_text().split("\0")[:-1]
    return dict(pair.split("=", 1) for pair in pairs)


def started(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.env"))


@pytest.mark.parametrize(("nodes", "ranks", "gpus"), [(2, 3, 3), (3, 1, 0), (1, 2, 2)])
def test_every_rank_gets_its_own_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, ranks: int, gpus: int
) -> None:
    ray = FakeRay(nodes, gpus).install(monkeypatch)
    given = {node: list(numbers) for node, numbers in enumerate(ray.gpus)}
    own = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID", "RAY_WORKER_ID", "RAY_RAYLET_SOCKET_NAME")
    ray.worker_env = dict.fromkeys(
        [*own, "RAY_ADDRESS", PAYLOAD, "INHERITED", "RANK", "MASTER_ADDR"], "of the actor"
    )
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    made = job(folder, nodes, ranks, gpus, cpus_per_rank=5)
    made = dataclasses.replace(made, env={"NCCL_SOCKET_IFNAME": "ib0", "MASTER_ADDR": "mine"})
    assert run(made, folder, monkeypatch) == 0
    envs = [environment(folder, rank) for rank in range(nodes * ranks)]
    for rank, env in enumerate(envs):
        node, local = divmod(rank, ranks)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "RAY_ADDRESS")
        assert {name: env[name] for name in names} == {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(nodes * ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "RAY_ADDRESS": "127.0.0.1:6379",
        }
        assert (env["OMP_NUM_THREADS"], env["PYTHONUNBUFFERED"], env["NCCL_SOCKET_IFNAME"]) == (
            "5",
            "1",
            "ib0",
        )
        assert not {PAYLOAD, *own} & set(env)
        assert env["INHERITED"] == "of the actor"
        if gpus:
            # NCCL needs to see the GPUs of all ranks of the node; the rank's own is number LOCAL_RANK of them.
            assert env["CUDA_VISIBLE_DEVICES"].split(",") == given[node]
            assert env["CUDA_VISIBLE_DEVICES"].split(",")[local] == ray.actors[rank].gpus[0]
            assert "DS_ACCELERATOR" not in env
        else:
            assert env["DS_ACCELERATOR"] == "cpu"
        recipe = [made.recipe_copy, "--stage", "masked"]
        argv = (folder / f"{rank}.argv").read_text().split("\0")[:-1]
        assert argv == ["-P", "-m", "launch.cli", "train", *recipe]
        assert (folder / f"{rank}.pwd").read_text().strip() == str(folder / "work")
        assert (folder / "run/masked/logs" / f"rank_{rank}.log").exists()
    assert len({env["MASTER_PORT"] for env in envs}) == 1
    assert 0 < int(envs[0]["MASTER_PORT"]) < 65536
    assert Path(made.recipe_copy).read_text() == dump(load_recipe(folder / "small.yaml"))


@pytest.mark.parametrize(("nodes", "ranks", "gpus"), [(2, 3, 4), (3, 1, 0)])
def test_a_bundle_holds_the_ranks_of_one_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, ranks: int, gpus: int
) -> None:
    ray = FakeRay(nodes, gpus).install(monkeypatch)
    assert run(job(folder, nodes, ranks, gpus, cpus_per_rank=2), folder, monkeypatch) == 0
    (group,) = ray.groups
    assert group.strategy == "STRICT_SPREAD"
    bundle = {"CPU": 2.0 * ranks, **({"GPU": float(ranks)} if gpus else {})}
    assert group.bundles == [bundle] * nodes
    assert [actor.bundle for actor in ray.actors] == [node for node in range(nodes) for _ in range(ranks)]
    for actor in ray.actors:
        assert (actor.asked["num_cpus"], actor.asked["num_gpus"]) == (2, 1 if gpus else 0)
        assert actor.asked["max_restarts"] == 0  # a restarted actor would not have its rank


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("[ $RANK = 1 ] && echo broken && exit 1; IDLE", 1, ["rank 1 of 2 ended with exit code 1", "broken"]),
        ("[ $RANK = 0 ] && exit 2; IDLE", 2, ["rank 0 of 2 ended with exit code 2", "(the log is empty)"]),
        ("[ $RANK = 1 ] && kill -KILL $$; IDLE", 1, ["rank 1 of 2 ended with SIGKILL"]),
        ("exit 75", 75, ["saved and stopped", "to resume: dromos run small.yaml --on ray --stage masked --nodes 2"]),
        ("trap 'exit 75' TERM; STOP", 75, ["stopped on SIGTERM", "to resume"]),
        ("trap 'kill -INT $DRIVER' TERM; STOP", 1, ["killed before the save ended"]),
    ],
)  # fmt: skip
def test_how_ranks_end_is_how_the_job_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: str, code: int,
    words: list[str],
) -> None:  # fmt: skip
    """Signals to the driver come from Ray (`ray job stop`); `ray.init` replaces the handlers."""
    FakeRay(2).install(monkeypatch)
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    (folder / "rank").write_text(body.replace("STOP", STOP).replace("IDLE", IDLE))
    before = signal.getsignal(signal.SIGTERM)
    assert run(job(folder, 2, 1, stages="masked"), folder, monkeypatch) == code
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_fails_the_job_and_the_other_ranks_are_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: int
) -> None:
    ray = FakeRay(2).install(monkeypatch)
    (folder / "rank").write_text(IDLE)
    real = driver.RankActors.start

    def start(self: driver.RankActors, stage: str, command: list[str]) -> driver.RayGroup:
        group = real(self, stage, command)
        ray.actors[lost].lost = True
        return group

    monkeypatch.setattr(driver.RankActors, "start", start)
    try:
        assert run(job(folder, 2, 1), folder, monkeypatch) == 1
    finally:
        ray.actors[lost].inner.kill()  # in place of the node's end
    printed = capsys.readouterr().out
    assert f"rank {lost} of 2 ended with the loss of its node or Ray actor" in printed
    assert "(its node does not respond)" in printed
    assert ray.actors[1 - lost].inner.poll() == -signal.SIGKILL


def test_a_done_job_asks_for_no_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = FakeRay(1).install(monkeypatch)
    (folder / "run/masked").mkdir(parents=True)
    (folder / "run/masked/result.json").write_text('{"step": 20}')
    assert run(job(folder, 1, 1), folder, monkeypatch) == 0
    assert "masked: done" in capsys.readouterr().out
    assert (ray.inits, ray.groups, started(folder)) == ([], [], [])


def test_a_wrong_recipe_is_the_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeRay(1).install(monkeypatch)
    given = dataclasses.replace(job(folder, 1, 1))
    monkeypatch.setenv(PAYLOAD, pack_payload(given, "train: {stesp: 3}\n"))
    assert driver.main() == 2
    assert capsys.readouterr().err.startswith("dromos: ")


def test_a_job_waits_for_its_nodes_and_then_gives_up_in_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock moves by 20 s at every look; a line is printed every 30 s at most."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 20.0
        return now[0]

    monkeypatch.setattr(driver.time, "monotonic", monotonic)
    from rich.console import Console

    given = job(folder, 2, 4, 4, cpus_per_rank=3, start_seconds=600)
    ray = FakeRay(2, 4, free_after=5).install(monkeypatch)
    assert driver.wait_for_placement(given, Console(width=200)) is ray.groups[0]
    line = "waiting for 2 node(s) with 12 CPU, 4 GPU each; the cluster has 4 CPU, 4 GPU; 4 CPU, 4 GPU\n"
    assert capsys.readouterr().out == line * 2  # at 40 s and 80 s of 100
    FakeRay(1, 0, free_after=10**6).install(monkeypatch)
    with pytest.raises(
        UserError, match=r"12 CPU, 4 GPU each were not free within 600 s; .* has 4 CPU, 0 GPU$"
    ):
        driver.wait_for_placement(given, Console(width=200))

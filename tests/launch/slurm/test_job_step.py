"""Commands of the batch script: a task's environment, the rendezvous, a stage's state, and exit codes."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from launch.slurm import job_step
from pretrain import merge_stage
from tests.support.fake_slurm import FakeSlurm
from tests.support.launching import write_recipe


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A fake Slurm whose programs this process calls, on the first of two nodes."""
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{slurm.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-1]")
    monkeypatch.setenv("SLURM_JOB_ID", "123456789")
    return slurm


@pytest.mark.parametrize(
    ("written", "per_node"),
    [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2),12(x11)", [1, 3, 3] + [12] * 11), ("1(x2)", [1, 1])],
)
def test_environment_of_every_task(written: str, per_node: list[int]) -> None:
    """Slurm's list of tasks per node, `2(x3),1`, is the only place of the number on this node."""
    places = [(node, local, count) for node, count in enumerate(per_node) for local in range(count)]
    for rank, (node, local, count) in enumerate(places):
        task = {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": str(len(places)),
            "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(node),
            "SLURM_STEP_TASKS_PER_NODE": written,
            "SLURM_CPUS_PER_TASK": "12",
        }
        assert job_step.rank_env(task) == {
            "RANK": str(rank),
            "WORLD_SIZE": str(sum(per_node)),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "12",
        }
        assert "OMP_NUM_THREADS" not in job_step.rank_env({**task, "OMP_NUM_THREADS": "3"})
        del task["SLURM_CPUS_PER_TASK"]
        assert job_step.rank_env(task)["OMP_NUM_THREADS"] == "1"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert job_step.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_rendezvous_is_a_free_port_of_the_first_node(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other jobs try other ports; a port that something else holds is passed over."""
    held: list[socket.socket] = []
    found = []
    try:
        for _ in range(3):
            address, port = printed(capsys, "rendezvous").split()
            assert address == "127.0.0.1"
            assert 20000 <= int(port) < 40000
            held.append(socket.socket())
            held[-1].bind(("", int(port)))  # fails if it is not free
            found.append(int(port))
    finally:
        for probe in held:
            probe.close()
    assert found[0] == int(printed(capsys, "rendezvous").split()[1])  # the same for every start of the job


def test_jobs_on_one_node_try_other_ports_in_another_order() -> None:
    for job in (1, 19_999, 20_000, 123_456_789):
        tried = job_step.ports(job)
        assert all(20000 <= port < 40000 for port in tried)
        assert len(set(tried)) == len(tried) == 100
        assert tried[0] != job_step.ports(job + 1)[0]
        # A neighbour's whole list differs, so that two jobs do not follow each other from port to port.
        assert len(set(tried) & set(job_step.ports(job + 1))) < 10


def test_without_a_free_port_or_an_address_the_step_ends_in_words(slurm: FakeSlurm) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert job_step.first_free([port, 0]) == 0
        with pytest.raises(SystemExit, match=f"none of 2 ports from {port} on is free on"):
            job_step.first_free([port, port])
    slurm.program("scontrol", "echo 'NodeName=n0 State=IDLE'")
    with pytest.raises(SystemExit, match=r"(?s)no NodeAddr in .*NodeName=n0 State=IDLE"):
        job_step.node_address("n0")


def test_the_state_of_a_stage_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path))
    assert printed(capsys, "state", recipe, "masked") == "todo\n"
    (tmp_path / "run/masked").mkdir(parents=True)
    (tmp_path / "run/masked/result.json").write_text('{"step": 20}')
    assert printed(capsys, "state", recipe, "masked") == "done\n"
    assert printed(capsys, "state", recipe, "tuned") == "todo\n"
    (tmp_path / "run/masked/result.json").write_text("{")
    assert job_step.main(["state", recipe, "masked"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("dromos: ")
    assert "is not valid JSON" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    "arguments", [[], ["rank"], ["rank", "--"], ["rank", "echo"], ["state", "r.yaml"], ["rendezvous", "x"]]
)
def test_a_command_that_is_none_is_told(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"usage: python -P -m launch\.slurm\.job_step rendezvous"):
        job_step.main(arguments)


@pytest.mark.parametrize("sent", [None, signal.SIGUSR1, signal.SIGTERM])
def test_a_merge_gets_its_stage_and_run_folder_and_ends_with_75_on_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals | None
) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + "  mix: {kind: merge, inputs: {masked: 0.4, tuned: 0.6}}\n")
    called = []

    def run_merge_stage(recipe: object, name: str, run_dir: Path) -> None:
        called.append((name, run_dir))
        if sent is not None:
            os.kill(os.getpid(), sent)

    monkeypatch.setattr(merge_stage, "run_merge_stage", run_merge_stage)
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    assert job_step.main(["merge", str(path), "mix"]) == (75 if sent else 0)
    assert called == [("mix", tmp_path / "run")]
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)] == before

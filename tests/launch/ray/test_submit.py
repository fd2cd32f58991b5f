"""Submission to a Ray cluster: what the job API is given, what its shell runs, and what becomes the exit code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shlex
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import UserError
from launch.job import Job
from launch.ray import submit
from launch.run import make_job, run
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from tests.support.launching import write_recipe

job_api = pytest.importorskip("ray.job_submission")
SUBMIT_JOB = inspect.signature(job_api.JobSubmissionClient.submit_job)


class Client:
    """In place of Ray's JobSubmissionClient; `looks` has (status, log) for every look at the job."""

    def __init__(self, *looks: tuple[str, str], code: int | None = None, message: str = "") -> None:
        self.looks, self.code, self.message = list(looks), code, message
        self.addresses: list[str] = []
        self.submitted: list[dict[str, Any]] = []
        self.others: list[Any] = []  # jobs of the cluster

    def __call__(self, address: str) -> Client:
        self.addresses.append(address)
        return self

    def list_jobs(self) -> list[Any]:
        return self.others

    def submit_job(self, **given: Any) -> str:
        SUBMIT_JOB.bind(self, **given)
        self.submitted.append(given)
        return given["submission_id"]

    def get_job_status(self, job_id: str) -> Any:
        assert job_id == self.submitted[0]["submission_id"]
        return job_api.JobStatus(self.looks[0][0])

    def get_job_logs(self, job_id: str) -> str:
        return self.looks.pop(0)[1]

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(driver_exit_code=self.code, message=self.message)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(submit, "time", SimpleNamespace(sleep=lambda _: None, strftime=time.strftime))
    (tmp_path / "cluster.yaml").write_text("kind: ray\naddress: http://head:8265\nstop_seconds: 77\n")
    return write_recipe(tmp_path)


def submitted(recipe: Path, client: Client, patch: pytest.MonkeyPatch, **flags: Any) -> int:
    patch.setattr(job_api, "JobSubmissionClient", client)
    cluster = str(recipe.parent / "cluster.yaml")
    return run(
        str(recipe), **{"on": "ray", "ranks_per_node": 2, "nodes": 2, "cluster_file": cluster, **flags}
    )


def test_the_cluster_gets_the_job_and_the_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client()
    overrides = ["run.name=a/b c", "train.steps=7"]
    assert submitted(recipe, client, monkeypatch, overrides=overrides) == 0
    (given,) = client.submitted
    assert client.addresses == ["http://head:8265"]
    env = given["runtime_env"]["env_vars"]
    job, text = submit.read_payload(env[submit.PAYLOAD])
    loaded = load_recipe(recipe, overrides)
    assert text == dump(loaded)
    wanted = make_job(loaded, str(recipe), "ray", None, 2, 2, str(recipe.parent / "cluster.yaml"), overrides)
    assert job == dataclasses.replace(wanted, job_id=given["submission_id"])
    assert env["RAY_JOB_STOP_WAIT_TIME_S"] == "77"  # Ray kills a job that is stopped after 3 s by default
    assert given["metadata"] == {
        "dromos_run": "a/b c",
        "dromos_run_dir": str(recipe.parent / "run"),
        "dromos_workdir": str(Path.cwd()),
    }
    assert given["submission_id"].startswith("a-b-c-20")
    printed = capsys.readouterr().out
    for command in ("job logs --address http://head:8265 --follow", "job stop --address http://head:8265"):
        assert f"ray {command} {given['submission_id']}\n" in printed
    assert "2 x 2 ranks" in printed
    again = Client()
    submitted(recipe, again, monkeypatch, overrides=overrides)
    assert again.submitted[0]["submission_id"] != given["submission_id"]


def test_the_clusters_shell_runs_the_driver_with_the_job_in_its_environment(tmp_path: Path) -> None:
    """Also where names have characters of the shell; `exec`, because Ray signals the process that it started."""
    hostile = tmp_path / "a b'c\"d$(touch pwned)`e`;f&g"
    hostile.mkdir()
    python = hostile / "py thon"
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > argv\nenv -0 > env\necho $$ $PPID > pid\n')
    python.chmod(0o755)
    job = Job(
        "r.yaml", "runs/x", (), on="ray", python=str(python), workdir=str(hostile),
        env={"WORDS": "a 'b' $c", "RAY_JOB_STOP_WAIT_TIME_S": "3"}, cluster={"kind": "ray"},
    )  # fmt: skip
    given = submit.submission(job, "the recipe")
    env = {"PATH": os.environ["PATH"], **given["runtime_env"]["env_vars"]}
    shell = subprocess.Popen(["sh", "-c", given["entrypoint"]], cwd="/", env=env)
    assert shell.wait() == 0
    assert (hostile / "argv").read_text().split("\0")[:-1] == ["-P", "-m", "launch.ray.driver"]
    assert int((hostile / "pid").read_text().split()[0]) == shell.pid
    found = dict(pair.split("=", 1) for pair in (hostile / "env").read_text().split("\0")[:-1])
    assert found["WORDS"] == "a 'b' $c"
    assert found["RAY_JOB_STOP_WAIT_TIME_S"] == "600"  # so long a job may save
    assert submit.read_payload(found[submit.PAYLOAD]) == (job, "the recipe")
    assert not list(tmp_path.rglob("pwned"))


def test_the_dry_run_shows_what_would_be_submitted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe.parent / "cluster.yaml"
    path.write_text(path.read_text() + "env: {X: 'a b'}\ncpus_per_rank: 3\ngpus_per_node: 2\n")
    client = Client()
    recipe.write_text(recipe.read_text() + "  mix: {kind: merge, inputs: {masked: 0.4, tuned: 0.6}}\n")
    assert submitted(recipe, client, monkeypatch, dry_run=True) == 0
    assert client.addresses == client.submitted == []
    lines = capsys.readouterr().out.splitlines()
    fields = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines if line[:1] not in " {}"}
    made = make_job(load_recipe(recipe), str(recipe), "ray", None, 2, 2, str(path))
    given = submit.submission(made, dump(load_recipe(recipe)))
    assert fields["address"] == "http://head:8265"
    assert fields["entrypoint"] == given["entrypoint"]
    shown = {line.removeprefix("env: ") for line in lines if line.startswith("env: ")}
    assert shown == {"X=a b", "RAY_JOB_STOP_WAIT_TIME_S=77"}
    assert fields["placement"] == "2 x {'CPU': 6.0, 'GPU': 2.0}, one actor per rank"
    assert shlex.split(fields["masked"]) == made.train_command("masked")
    assert fields["mix"] == "merge"
    assert json.loads("\n".join(lines)[("\n".join(lines)).index("job: {") + 5 :]) == json.loads(
        made.to_json()
    )


@pytest.mark.parametrize(
    ("file", "api", "address", "used"),
    [
        ("http://file:1", "http://api:2", "http://address:3", "http://file:1"),
        (None, "http://api:2", "http://address:3", "http://api:2"),
        (None, None, "http://address:3", "http://address:3"),
        (None, None, None, None),
    ],
)
def test_the_address_is_that_of_the_file_else_of_rays_variables(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, api: str | None, address: str | None,
    used: str | None,
) -> None:  # fmt: skip
    (recipe.parent / "cluster.yaml").write_text(f"kind: ray\n{f'address: {file}' if file else ''}\n")
    for name, value in (("RAY_API_SERVER_ADDRESS", api), ("RAY_ADDRESS", address)):
        if value:
            monkeypatch.setenv(name, value)
    client = Client()
    if used is None:
        with pytest.raises(UserError, match=r"--on ray: no cluster address; .*http://HEAD:8265"):
            submitted(recipe, client, monkeypatch)
        assert submitted(recipe, client, monkeypatch, dry_run=True) == 0
    else:
        assert submitted(recipe, client, monkeypatch) == 0
        assert client.addresses == [used]


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("500"), ValueError("no version")])
def test_a_cluster_that_refuses_is_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    client = Client()
    monkeypatch.setattr(client, "submit_job", lambda **_: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=f"the cluster at http://head:8265 did not accept the job: {error}"):
        submitted(recipe, client, monkeypatch)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 75),  # its ranks have saved
        ("STOPPED", 1, 75),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 75, 75),
        ("FAILED", 137, 1),
        ("FAILED", None, 1),
    ],
)
def test_wait_prints_the_log_once_and_ends_as_the_job(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str,
    driver: int | None, code: int,
) -> None:  # fmt: skip
    """Ray gives the whole log at every look, cut anywhere; whole lines are printed while the job runs."""
    log = "one\ntwo\nthree [red]\nlast without a line end"
    looks = [("PENDING", ""), *(("RUNNING", log[:n]) for n in (2, 4, 5, 5, 9, 20)), (status, log)]
    client = Client(*looks, code=driver, message="the node died")
    pieces: list[str] = []
    sleep = SimpleNamespace(sleep=lambda _: pieces.append(capsys.readouterr().out), strftime=time.strftime)
    monkeypatch.setattr(submit, "time", sleep)
    assert submitted(recipe, client, monkeypatch, wait=True) == code
    assert len(pieces) == len(looks) - 1
    assert all(piece == "" or piece.endswith("\n") for piece in pieces)
    job_id = client.submitted[0]["submission_id"]
    whole = "".join(pieces) + capsys.readouterr().out
    printed = whole.partition("on the cluster\n")[2].partition("on the cluster\n")[2]
    end = "the node died\n" if (status, driver) == ("FAILED", None) else ""
    assert printed == f"{log}job {job_id}: {status.lower()}\n{end}"


def test_to_stop_waiting_leaves_the_job(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        assert seconds > 0
        raise KeyboardInterrupt

    client = Client(("RUNNING", ""))
    monkeypatch.setattr(submit, "time", SimpleNamespace(sleep=interrupt, strftime=time.strftime))
    assert submitted(recipe, client, monkeypatch, wait=True) == 1
    job_id = client.submitted[0]["submission_id"]
    assert f"job {job_id} continues to run; `ray job stop {job_id}` saves" in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "bundle"), [(0, {"CPU": 12.0}), (4, {"CPU": 12.0, "GPU": 4.0})])
def test_a_bundle_is_what_the_ranks_of_a_node_need(gpus: int, bundle: dict[str, float]) -> None:
    cluster = {"kind": "ray", "cpus_per_rank": 3}
    job = Job("r", "x", (), on="ray", nodes=5, ranks_per_node=4, gpus_per_node=gpus, cluster=cluster)
    assert submit.bundle(job) == bundle


@pytest.mark.parametrize(
    ("status", "run_dir", "workdir", "refused"),
    [
        ("RUNNING", "RUN", "HERE", True),
        ("PENDING", "RUN", "HERE", True),
        ("PENDING", "RUN", None, True),  # of an older version
        ("STOPPED", "RUN", "HERE", False),
        ("FAILED", "RUN", "HERE", False),
        ("RUNNING", "other", "HERE", False),
        ("RUNNING", "RUN", "/elsewhere", False),
        ("RUNNING", None, None, False),  # a job of another program
    ],
)
def test_a_run_folder_of_a_job_on_the_cluster_is_refused(
    recipe: Path, status: str, run_dir: str | None, workdir: str | None, refused: bool
) -> None:
    job = make_job(load_recipe(recipe), str(recipe), on="ray")
    given = {"dromos_run_dir": run_dir, "dromos_workdir": workdir}
    names = {"RUN": job.run_dir, "HERE": job.workdir}
    metadata = {key: names.get(value, value) for key, value in given.items() if value is not None}
    other = SimpleNamespace(
        metadata=metadata or None,
        status=job_api.JobStatus(status),
        submission_id="small-1",
        start_time=1767323045000,
        driver_info=SimpleNamespace(pid="77", node_ip_address="10.0.0.3"),
    )
    client = SimpleNamespace(list_jobs=lambda: [other])
    if not refused:
        submit.check_jobs(client, job, "http://head:8265")
        return
    with pytest.raises(UserError) as error:
        submit.check_jobs(client, job, "http://head:8265")
    for word in (
        f"belongs to Ray job small-1 ({status.lower()}, since 2026-01-02 03:04:05 UTC, pid 77 on 10.0.0.3)",
        "ray job logs --address http://head:8265 --follow small-1",
        "ray job stop --address http://head:8265 small-1",
    ):
        assert word in str(error.value)

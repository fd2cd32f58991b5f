"""What the sbatch script does in bash, with stand-ins for Slurm's programs that act as their manuals say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from launch.job import Job, StageJob
from launch.slurm import sbatch
from launch.slurm.sbatch import render
from tests.support.fake_slurm import FakeSlurm

TRAIN = (StageJob("masked", "train", 5),)
# A rank that computes until it gets a signal.
IDLE = "tail --pid=$$ -f /dev/null & while :; do wait; done"
CHAIN = (StageJob("masked", "train", 5), StageJob("mix", "merge"), StageJob("tuned", "train", 3))


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def job(slurm: FakeSlurm, stages: tuple[StageJob, ...] = TRAIN, **values: object) -> Job:
    given = Job(
        recipe="small.yaml",
        run_dir="runs/small",
        stages=stages,
        on="slurm",
        python=slurm.python,
        workdir=str(slurm.folder),
        recipe_id="0123456789ab",
        cluster={"kind": "slurm"},
    )
    return dataclasses.replace(given, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("nodes", "per_node", "gpus"), [(2, 2, 2), (1, 3, 0), (3, 1, 0)])
def test_every_rank_gets_its_own_place_and_the_same_rendezvous(
    slurm: FakeSlurm, nodes: int, per_node: int, gpus: int
) -> None:
    cluster = {"kind": "slurm", "cpus_per_rank": 5, "gpus_per_node": gpus}
    script = render(
        job(
            slurm, nodes=nodes, ranks_per_node=per_node, gpus_per_node=gpus, cluster=cluster, env={"X": "1 2"}
        )
    )
    # sbatch passes the environment of the shell on, which may be that of another job.
    outer = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "X"), "99")
    done = slurm.run(script, MASTER_ADDR="other", **outer)
    assert done.returncode == 0, done.stderr
    envs = [slurm.env("train", "masked", rank) for rank in range(nodes * per_node)]
    assert len(slurm.order) == 1 + len(envs)
    for rank, env in enumerate(envs):
        place = {name: int(env[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        assert place == {
            "RANK": rank,
            "LOCAL_RANK": rank % per_node,
            "WORLD_SIZE": nodes * per_node,
            "LOCAL_WORLD_SIZE": per_node,
        }
        assert env["SLURM_NODEID"] == str(rank // per_node)
        assert (env["OMP_NUM_THREADS"], env["PYTHONUNBUFFERED"], env["X"]) == ("5", "1", "1 2")
        assert env.get("DS_ACCELERATOR") == (None if gpus else "cpu")
        recipe = ["runs/small/recipe-0123456789ab.yaml", "--stage", "masked"]
        assert slurm.argv("train", "masked", rank) == ["-P", "-m", "launch.cli", "train", *recipe]
    assert {env["MASTER_ADDR"] for env in envs} == {"127.0.0.1"}  # of the first node
    (port,) = {int(env["MASTER_PORT"]) for env in envs}
    assert 20000 <= port < 40000
    assert f"rendezvous at 127.0.0.1:{port}" in done.stdout


def test_stages_run_in_order_and_a_done_one_is_skipped(slurm: FakeSlurm) -> None:
    slurm.on("state", "masked", "echo done; exit 0")
    done = slurm.run(render(job(slurm, CHAIN, nodes=2)))
    assert done.returncode == 0, done.stderr
    assert slurm.order[:4] == ["state masked 0", "state mix 0", "merge mix 0", "state tuned 0"]
    assert sorted(slurm.order[4:]) == ["train tuned 0", "train tuned 1"]
    assert "masked: done" in done.stdout
    recipe = "runs/small/recipe-0123456789ab.yaml"
    for what in ("state", "merge"):
        assert slurm.argv(what, "mix") == ["-P", "-m", "launch.slurm.job_step", what, recipe, "mix"]
    merge = slurm.env("merge", "mix")
    assert (merge["SLURM_NTASKS"], merge["SLURM_PROCID"]) == ("1", "0")
    assert slurm.requeued == []


def test_what_a_rank_prints_is_in_its_own_log_and_a_later_start_appends(slurm: FakeSlurm) -> None:
    """Also in a folder whose name has Slurm's pattern characters."""
    slurm.on("train", "masked", 'echo "I am $RANK"')
    script = render(job(slurm, nodes=2, run_dir="runs/50%_j%t"))
    for _ in range(2):
        assert slurm.run(script).returncode == 0
    logs = slurm.folder / "runs/50%_j%t/masked/logs"
    assert {path.name: path.read_text() for path in logs.iterdir()} == {
        f"rank_{rank}.log": f"I am {rank}\n" * 2 for rank in (0, 1)
    }


@pytest.mark.parametrize("where", ["train masked", "merge mix", "state mix"])
def test_a_stage_that_fails_is_the_last(slurm: FakeSlurm, where: str) -> None:
    slurm.on(*where.split(), 'exit "${RANK:-0}3"')  # type: ignore[misc]
    done = slurm.run(render(job(slurm, CHAIN, nodes=2)))
    assert done.returncode == 1
    assert slurm.order[-1].startswith(where)
    assert not any("tuned" in line for line in slurm.order)
    assert slurm.requeued == []


def test_whatever_stands_in_a_name_reaches_the_rank_as_it_is(tmp_path: Path) -> None:
    hostile = "a b'c\"d$(touch pwned)`e`;f&g"
    slurm = FakeSlurm(tmp_path / hostile)
    stages = (StageJob("a-b.c", "train", 5), StageJob("mix", "merge"))
    cluster = {"kind": "slurm", "extra": {"output": "out", "chdir": False}}
    made = job(slurm, stages, run_dir=f"runs/{hostile}", env={"WORDS": hostile}, cluster=cluster)
    done = slurm.run(render(made))
    assert done.returncode == 0, done.stderr
    recipe = f"runs/{hostile}/recipe-0123456789ab.yaml"
    assert slurm.argv("train", "a-b.c")[-3:] == [recipe, "--stage", "a-b.c"]
    assert slurm.argv("merge", "mix")[-2:] == [recipe, "mix"]
    assert slurm.env("train", "a-b.c")["WORDS"] == hostile
    assert (slurm.folder / f"runs/{hostile}/a-b.c/logs/rank_0.log").exists()
    assert not list(tmp_path.rglob("pwned"))


def test_setup_lines_run_once_before_the_first_stage(slurm: FakeSlurm) -> None:
    setup = ['echo "setup $X" >> setup.log', "export FROM_SETUP=$X$X", "export X=changed"]
    cluster = {"kind": "slurm", "setup": setup}
    assert slurm.run(render(job(slurm, CHAIN, cluster=cluster, env={"X": "a b"}))).returncode == 0
    assert (slurm.folder / "setup.log").read_text() == "setup a b\n"
    for what, stage in (("state", "masked"), ("train", "masked"), ("train", "tuned")):
        assert slurm.env(what, stage)["FROM_SETUP"] == "a ba b"
        assert slurm.env(what, stage)["X"] == "changed"


# (exit code of the rank, signal that the batch script gets, state of the job) -> (exit code of the job, is requeued)
ENDS = [
    (0, "", "R", 0, False),
    (1, "", "R", 1, False),
    (3, "", "R", 1, False),
    (137, "", "R", 1, False),
    (2, "", "R", 2, False),
    (75, "", "R", 75, True),
    (75, "", "CG", 75, False),  # cancelled: the job is completing
    (75, "", "", 75, False),  # squeue fails or no longer knows the job
    (75, "USR1", "R", 75, True),
    (75, "TERM", "CG", 75, False),
    (138, "USR1", "R", 75, True),  # a rank that had not started dies of the signal
    (1, "TERM", "R", 75, True),
    (2, "USR1", "R", 2, False),  # a wrong recipe stays wrong
]


@pytest.mark.parametrize(("code", "sent", "state", "ends_with", "queued"), ENDS)
def test_what_a_stage_ends_with_decides_what_the_job_does(
    slurm: FakeSlurm, code: int, sent: str, state: str, ends_with: int, queued: bool
) -> None:
    signal = f"trap 'exit {code}' USR1; kill -{sent} $(cat batch); {IDLE}"
    slurm.on("train", "masked", signal if sent else f"exit {code}")
    (slurm.folder / "state").write_text(state)
    done = slurm.run(render(job(slurm)))
    assert done.returncode == ends_with, done.stderr
    assert slurm.requeued == ["7"] * queued


@pytest.mark.parametrize(
    ("options", "restarts", "queued"),
    [
        ({"max_requeues": 2}, None, True),
        ({"max_requeues": 2}, "1", True),
        ({"max_requeues": 2}, "2", False),
        ({"max_requeues": 0}, None, False),
        ({"requeue": False}, None, False),
    ],
)
def test_a_job_is_requeued_as_often_as_the_cluster_file_says(
    slurm: FakeSlurm, options: dict[str, int], restarts: str | None, queued: bool
) -> None:
    slurm.on("train", "masked", "exit 75")
    env = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    assert slurm.run(render(job(slurm, cluster={"kind": "slurm", **options})), **env).returncode == 75
    assert slurm.requeued == ["7"] * queued


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_between_two_stages_starts_no_other_one(slurm: FakeSlurm, name: str) -> None:
    slurm.on("state", "masked", f"kill -{name} $(cat batch); echo done; exit 0")
    assert slurm.run(render(job(slurm, CHAIN))).returncode == 75
    assert slurm.order == ["state masked 0"]
    assert slurm.requeued == ["7"]


def test_ranks_that_save_are_waited_for_through_further_signals(slurm: FakeSlurm) -> None:
    """Slurm sends USR1 before the time limit, and TERM when it cancels the job; each ends bash's `wait`."""
    heard = "n=$((n + 1)); if [ $n = 3 ]; then echo saved; exit 75; fi; kill -TERM $(cat batch)"
    slurm.on("train", "masked", f"n=0; trap '{heard}' USR1; kill -USR1 $(cat batch); {IDLE}")
    done = slurm.run(render(job(slurm, CHAIN)))
    assert done.returncode == 75, done.stderr
    assert (slurm.folder / "runs/small/masked/logs/rank_0.log").read_text() == "saved\n"
    assert slurm.order == ["state masked 0", "train masked 0"]


def test_a_rank_that_has_saved_waits_for_the_others(slurm: FakeSlurm) -> None:
    slurm.on("train", "masked", "[ $RANK = 0 ] && exit 75; sleep 0.3; echo saved; exit 75")
    assert slurm.run(render(job(slurm, nodes=2))).returncode == 75
    assert (slurm.folder / "runs/small/masked/logs/rank_1.log").read_text() == "saved\n"


def test_a_rank_that_waits_for_a_failed_one_is_ended(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 10 <= sbatch.STRAGGLER_SECONDS <= 600
    monkeypatch.setattr(sbatch, "STRAGGLER_SECONDS", 1)
    slurm.on("train", "masked", f"[ $RANK = 0 ] && exit 1; {IDLE}")
    assert slurm.run(render(job(slurm, nodes=2))).returncode == 1


RAY_STAGE = (StageJob("masked", "train", 5, "ray"),)
# In place of Ray's command line: records how it was called, says what Ray says, and runs until it is stopped.
RAY = """
import json, os, signal, sys
folder = os.environ["RAY_CALLS"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as file:
    json.dump({"argv": sys.argv[1:], "env": dict(os.environ)}, file)
if "--head" in sys.argv and os.environ.get("RAY_FAILS"):
    sys.exit("no memory for the object store")
print("Ray runtime started.", flush=True)
signal.pause()
"""


@pytest.fixture
def ray(slurm: FakeSlurm) -> dict[str, str]:
    """Variables with which the job's Ray nodes run a stand-in for Ray."""
    package = slurm.folder / "fake" / "ray" / "scripts"
    package.mkdir(parents=True)
    for path in (package.parent / "__init__.py", package / "__init__.py"):
        path.write_text("")
    (package / "scripts.py").write_text(RAY)
    (slurm.folder / "calls").mkdir()
    (slurm.folder / "tmp").mkdir()
    root = Path(__file__).resolve().parents[3]
    return {
        "PYTHONPATH": f"{package.parents[1]}:{root}",
        "RAY_CALLS": str(slurm.folder / "calls"),
        "TMPDIR": str(slurm.folder / "tmp"),
        "SLURM_CPUS_ON_NODE": "6",
    }


def ray_options(slurm: FakeSlurm) -> dict[str, dict[str, str]]:
    """Options of `ray start` by node address, with the environment's token file under `token`."""
    found = {}
    for path in (slurm.folder / "calls").iterdir():
        call = json.loads(path.read_text())
        assert call["argv"][0] == "start"
        options = dict(re.match(r"--([a-z-]+)=?(.*)", word).groups() for word in call["argv"][1:])  # type: ignore[union-attr]
        found[options["node-ip-address"]] = options | {"token": call["env"]["RAY_AUTH_TOKEN_PATH"]}
        assert call["env"]["RAY_AUTH_MODE"] == "token"
    return found


def test_a_loader_on_ray_gets_one_ray_node_per_slurm_node(slurm: FakeSlurm, ray: dict[str, str]) -> None:
    token = (
        '[ "$(stat -c %a "$RAY_AUTH_TOKEN_PATH")" = 600 ] && [ "$(wc -c < "$RAY_AUTH_TOKEN_PATH")" -ge 32 ]'
    )
    slurm.on("train", "masked", f"{token} && [ $RAY_AUTH_MODE = token ] || exit 1")
    done = slurm.run(render(job(slurm, RAY_STAGE, nodes=2)), **ray)
    assert done.returncode == 0, done.stderr + done.stdout
    nodes = ray_options(slurm)
    head, joined = nodes["127.0.0.1"], nodes["127.0.0.2"]
    assert "head" in head
    assert "head" not in joined
    assert joined["address"] == f"127.0.0.1:{head['port']}"
    assert head["num-cpus"] == joined["num-cpus"] == "6"
    for rank in (0, 1):
        env = slurm.env("train", "masked", rank)
        assert env["RAY_ADDRESS"] == joined["address"]
        assert env["RAY_AUTH_TOKEN_PATH"] == head["token"] == joined["token"]
    assert Path(head["token"]).is_relative_to(slurm.folder / "runs/small")
    assert not Path(head["token"]).parent.exists()
    assert list((slurm.folder / "tmp").iterdir()) == []
    assert sorted(path.name for path in (slurm.folder / "runs/small").glob("ray*")) == [
        "ray-7-0.log",
        "ray-7-1.log",
    ]


def test_the_jobs_ray_ends_before_the_job_is_requeued(slurm: FakeSlurm, ray: dict[str, str]) -> None:
    slurm.on("train", "masked", "exit 75")
    slurm.program("squeue", "ls -d runs/small/.ray-* tmp/* > left-at-squeue 2>&1; echo R")
    body = (slurm.bin / "scontrol").read_text().partition("\n")[2]
    slurm.program("scontrol", f'[ "$1" = requeue ] && ls -A runs/small tmp | grep ray- > left 2>&1\n{body}')
    assert slurm.run(render(job(slurm, RAY_STAGE)), SLURM_RESTART_COUNT="3", **ray).returncode == 75
    assert slurm.requeued == ["7"]
    assert (slurm.folder / "left").read_text().split() == ["ray-7-0.log"]
    assert ".ray-7-3" in (slurm.folder / "left-at-squeue").read_text()


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_ray_that_does_not_start_fails_the_job_at_once_and_leaves_nothing(
    slurm: FakeSlurm, ray: dict[str, str], nodes: int
) -> None:
    """The limit of five minutes would end the test."""
    done = slurm.run(render(job(slurm, RAY_STAGE, nodes=nodes)), RAY_FAILS="1", **ray)
    assert done.returncode == 1
    assert (
        f"the Ray of node 0 of the job ended at its start; see {slurm.folder}/runs/small/ray-7-0.log"
        in done.stderr
    )
    assert not any(line.startswith("train") for line in slurm.order)
    assert "no memory for the object store" in (slurm.folder / "runs/small/ray-7-0.log").read_text()
    assert list((slurm.folder / "tmp").iterdir()) == list((slurm.folder / "runs/small").glob(".ray*")) == []


def test_an_srun_of_ray_that_cannot_start_fails_the_job_at_once(
    slurm: FakeSlurm, ray: dict[str, str]
) -> None:
    slurm.program("srun", 'echo "srun: error: Unable to create step" >&2; exit 1')
    done = slurm.run(render(job(slurm, RAY_STAGE)), **ray)
    assert done.returncode == 1
    assert (
        "not all 1 nodes of the job's Ray cluster are up, and the srun that runs them has ended"
        in done.stderr
    )


def test_a_named_ray_cluster_is_used_and_no_ray_started(slurm: FakeSlurm, ray: dict[str, str]) -> None:
    done = slurm.run(render(job(slurm, RAY_STAGE)), RAY_ADDRESS="head:6379", **ray)
    assert done.returncode == 0, done.stderr
    assert slurm.env("train", "masked")["RAY_ADDRESS"] == "head:6379"
    assert "RAY_AUTH_TOKEN_PATH" not in slurm.env("train", "masked")
    assert list((slurm.folder / "calls").iterdir()) == []

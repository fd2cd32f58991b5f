"""The Slurm door: renders a job to an sbatch script, submits it, and waits for it where asked to."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish
from launch.cluster import SlurmCluster, parse_cluster
from launch.job import Job, StageJob
from launch.run_folder import open_run, taken_back
from launch.supervise.stage_runner import say
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, FAILED, GO_ON, USER_ERROR

TEMPLATES = Path(__file__).parent / "templates"
SCRIPT = "job.sbatch"
POLL_SECONDS = 2.0
UNKNOWN_TRIES = 6  # a busy controller answers after a while: a minute in all
# What a killed or hung rank leaves to the others; not --kill-on-bad-exit, which would cut the save of those that
# have not yet exited when the first one is done saving (75 is a bad exit to Slurm).
STRAGGLER_SECONDS = 60
ENDED = [
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
]


def render(job: Job) -> str:
    """The sbatch script, to the letter."""
    cluster = _cluster(job)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["q"] = shlex.quote
    return environment.get_template("sbatch.j2").render(
        job=job,
        options=options(job, cluster),
        lead=cluster.signal_lead,
        requeue=cluster.requeue,
        max_requeues=cluster.max_requeues,
        env=rank_environment(job),
        setup=cluster.setup,
        python=shlex.quote(job.python),
        recipe=job.copy_of_recipe,
        run_folder=str(job.folder),
        own_ray=_own_ray(job, cluster) if any(stage.loader == "ray" for stage in job.stages) else None,
        stages=[_stage(job, stage, cluster) for stage in job.stages],
    )


def options(job: Job, cluster: SlurmCluster) -> list[tuple[str, str | None]]:
    """sbatch's options in order; `extra` of the cluster file replaces what stands here, `false` removes it."""
    found: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": cluster.cpus_per_rank,
        "gres": f"gpu:{job.gpus_per_node}" if job.gpus_per_node else None,
        "chdir": job.workdir,
        "output": f"{_pattern(job.folder)}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{cluster.signal_lead}",
        "requeue" if cluster.requeue else "no-requeue": True,
    }
    found |= cluster.extra
    kept = ((name, value) for name, value in found.items() if value is not None and value is not False)
    return [(name, None if value is True else quote_option(name, str(value))) for name, value in kept]


def quote_option(name: str, value: str) -> str:
    """A value on an #SBATCH line, which sbatch splits at blanks and reads quotes in."""
    if re.search(r"[\"'\\\n]", value):
        raise UserError(
            f"--{name}={value!r}: quotes, backslashes and line ends cannot stand in an sbatch option"
        )
    return f'"{value}"' if re.search(r"[\s#]", value) else value


def rank_environment(job: Job) -> dict[str, str]:
    """What the script exports; RANK and its like are derived in each task."""
    cpu = {} if job.gpus_per_node else {"DS_ACCELERATOR": "cpu"}
    return {"PYTHONUNBUFFERED": "1", **cpu, **job.env}


def _stage(job: Job, stage: StageJob, cluster: SlurmCluster) -> dict[str, Any]:
    trains = stage.kind == "train"
    logs = job.folder / stage.name / "logs"
    srun = {
        "nodes": job.nodes if trains else 1,
        "ntasks": job.world_size if trains else 1,
        "ntasks-per-node": job.ranks_per_node if trains else 1,
        "cpus-per-task": cluster.cpus_per_rank,
        "kill-on-bad-exit": 0,
        "wait": STRAGGLER_SECONDS,
        "output": f"{_pattern(logs)}/rank_%t.log",
        "open-mode": "append",
    }
    if trains:
        command = [
            job.python,
            "-P",
            "-m",
            "launch.slurm.job_step",
            "rank",
            "--",
            *job.train_command(stage.name),
        ]
    else:
        command = [job.python, "-P", "-m", "launch.slurm.job_step", "merge", job.copy_of_recipe, stage.name]
    ranks = f"{job.nodes} x {job.ranks_per_node} ranks"
    return {
        "name": stage.name,
        "trains": trains,
        "what": f"training, {ranks}" if trains else "merge, one process",
        "logs": str(logs),
        "srun": shlex.join(["srun", *(f"--{name}={value}" for name, value in srun.items())]),
        "command": shlex.join(command),
    }


def _own_ray(job: Job, cluster: SlurmCluster) -> str:
    """The step that keeps one Ray node on each node, beside the ranks."""
    srun = {
        "nodes": job.nodes,
        "ntasks": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpus_per_rank,
        "output": f"{_pattern(job.folder)}/ray-%j-%t.log",
        "open-mode": "append",
    }
    flags = [f"--{name}={value}" for name, value in srun.items()]
    return shlex.join(["srun", "--overlap", *flags, job.python, "-P", "-m", "launch.slurm.ray_node", "run"])


def _pattern(path: Path) -> str:
    """A path in which Slurm is to expand nothing."""
    return str(path).replace("%", "%%")


def _cluster(job: Job) -> SlurmCluster:
    cluster = parse_cluster(dict(job.cluster))
    assert isinstance(cluster, SlurmCluster)
    return cluster


def submit(job: Job, recipe: Recipe, console: Console, wait: bool = False) -> int:
    """Write RUN/job.sbatch, submit it, say where its logs are; with `wait`, stay until it has ended."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "--on slurm: there is no sbatch on this machine; submit from a login node, or see --dry-run"
        )
    text = render(job)
    with taken_back(job, SCRIPT):  # written first: an accepted job may start at once
        open_run(job, recipe)
        script = job.folder / SCRIPT
        publish(script, text.encode())
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            env=outside_of_jobs(dict(os.environ)),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"sbatch refused the job (--dry-run shows it):\n{done.stderr.strip()}")
    job_id = done.stdout.strip().split(";")[0]
    publish(job.folder / "job.json", dataclasses.replace(job, job_id=job_id).to_json().encode())
    folder = job.run_dir if Path(job.workdir) == Path.cwd() else str(job.folder)
    say(console, f"submitted job {job_id}: {job.nodes} x {job.ranks_per_node} ranks, {folder}/{SCRIPT}")
    say(console, f"log: {folder}/slurm-{job_id}.log")
    for stage in job.stages:
        say(console, f"ranks: {folder}/{stage.name}/logs/rank_N.log")
    return wait_for(job_id, job, console) if wait else DONE


def outside_of_jobs(environ: dict[str, str]) -> dict[str, str]:
    """Inside a job, its SLURM_* would steer the new one."""
    if "SLURM_JOB_ID" not in environ:
        return environ
    return {name: value for name, value in environ.items() if not re.match(r"(SLURM|SBATCH|SRUN|PMI)_", name)}


def job_state(job_id: str) -> tuple[str, int]:
    """(state, exit code) as scontrol shows them; UNKNOWN where it does not know the job any more."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True).stdout
    state = re.search(r"\bJobState=(\w+)", shown)
    code = re.search(r"\bExitCode=(\d+):(\d+)", shown)
    return (state[1] if state else "UNKNOWN"), (int(code[1]) if code else 1)


def wait_for(job_id: str, job: Job, console: Console) -> int:
    """Follow the job's state until it has ended; its exit code is ours."""
    before, unknown = "", 0
    try:
        while True:
            state, code = job_state(job_id)
            unknown = unknown + 1 if state == "UNKNOWN" else 0
            if unknown == UNKNOWN_TRIES:
                log = job.folder / f"slurm-{job_id}.log"
                say(
                    console,
                    f"job {job_id}: scontrol does not answer for it any more; how it ended is in {log}",
                )
                return FAILED
            if state != before and not unknown:
                say(console, f"job {job_id}: {state.lower()}")
                before = state
            if state in ENDED:
                return DONE if state == "COMPLETED" else code if code in (USER_ERROR, GO_ON) else FAILED
            time.sleep(POLL_SECONDS * 2 ** max(0, unknown - 1))
    except KeyboardInterrupt:
        say(console, f"job {job_id} goes on; `scancel {job_id}` ends it")
        return FAILED

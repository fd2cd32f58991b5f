"""Slurm backend: renders a job as an sbatch script, submits it, and with `--wait` follows it to its end."""

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
from launch.run_folder import open_run, rollback_on_error
from launch.run_lock import SLURM_END_STATES, run_lock, scontrol_show, slurm_field
from launch.supervise.output import print_line
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, FAILED, RUN_AGAIN, USER_ERROR
from pretrain.run.failures import RunStopped, explain
from pretrain.run.lock import LOCK

TEMPLATES = Path(__file__).parent / "templates"
SCRIPT = "job.sbatch"
POLL_SECONDS = 2.0
UNKNOWN_ATTEMPTS = 6  # about one minute in all: a busy controller may not answer for some seconds
# Time that the other ranks have after the first rank exits. --kill-on-bad-exit is no alternative: Slurm counts exit
# code 75 as bad, and would kill ranks that still save when the first one has saved.
STRAGGLER_SECONDS = 60


def render(job: Job) -> str:
    """The sbatch script, exactly as submitted."""
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
        recipe=job.recipe_copy,
        run_folder=str(job.folder),
        lock_file=str(job.folder / LOCK),
        own_ray=_own_ray(job, cluster) if any(stage.loader == "ray" for stage in job.stages) else None,
        stages=[_stage(job, stage, cluster) for stage in job.stages],
    )


def options(job: Job, cluster: SlurmCluster) -> list[tuple[str, str | None]]:
    """sbatch options in order. `extra` of the cluster file overrides an option; `false` removes it."""
    values: dict[str, str | int | bool | None] = {
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
    values |= cluster.extra
    kept = ((name, value) for name, value in values.items() if value is not None and value is not False)
    return [(name, None if value is True else quote_option(name, str(value))) for name, value in kept]


def quote_option(name: str, value: str) -> str:
    """Quote a value for an #SBATCH line: sbatch splits the line at blanks and interprets quotes."""
    if re.search(r"[\"'\\\n]", value):
        raise UserError(
            f"--{name}={value!r}: an sbatch option cannot contain quotes, backslashes or line breaks"
        )
    return f'"{value}"' if re.search(r"[\s#]", value) else value


def rank_environment(job: Job) -> dict[str, str]:
    """Variables that the script exports. RANK and similar ones are derived in each task."""
    cpu = {} if job.gpus_per_node else {"DS_ACCELERATOR": "cpu"}
    return {"PYTHONUNBUFFERED": "1", **cpu, **job.env}


def _stage(job: Job, stage: StageJob, cluster: SlurmCluster) -> dict[str, Any]:
    """The template's values of one stage: names, log folder, srun command line."""
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
        command = [job.python, "-P", "-m", "launch.slurm.job_step", "merge", job.recipe_copy, stage.name]
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
    """The srun command that runs one Ray node on each Slurm node, beside the ranks."""
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
    """A path as a Slurm file name pattern that expands to the same path."""
    return str(path).replace("%", "%%")


def _cluster(job: Job) -> SlurmCluster:
    cluster = parse_cluster(dict(job.cluster))
    assert isinstance(cluster, SlurmCluster)
    return cluster


def submit(job: Job, recipe: Recipe, console: Console, wait: bool = False) -> int:
    """Write RUN/job.sbatch, submit it, and print where its logs are; returns the exit code.

    With `wait`, returns when the job has ended. Raises UserError, and restores the run folder, if sbatch refuses or if
    another launch or job writes into the folder; RunStopped if job.json cannot be written for the accepted job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--on slurm: sbatch is not installed on this machine; submit from a login node, or use --dry-run"
        )
    text = render(job)
    # A job that starts at once waits for this lock. job.json must name the job before another launch may look.
    with run_lock(job, console) as lock:
        with rollback_on_error(job, SCRIPT):  # files first: an accepted job may start at once
            open_run(job, recipe)
            publish(job.folder / SCRIPT, text.encode())
            job_id = _sbatch(job.folder / SCRIPT)
            lock.keep()  # the job may have opened it: in a new file, a second launch would not see its lock
            unrecorded = _record(job, job_id)
        if unrecorded is not None:  # after the block: the job needs the files
            raise unrecorded
    folder = job.run_dir if Path(job.workdir) == Path.cwd() else str(job.folder)
    print_line(
        console, f"submitted job {job_id}: {job.nodes} x {job.ranks_per_node} ranks, {folder}/{SCRIPT}"
    )
    print_line(console, f"log: {folder}/slurm-{job_id}.log")
    for stage in job.stages:
        print_line(console, f"ranks: {folder}/{stage.name}/logs/rank_N.log")
    return wait_for(job_id, job, console) if wait else DONE


def _sbatch(script: Path) -> str:
    """Submit a script; returns the job's id. Raises UserError if sbatch refuses it."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)],
        env=without_job_variables(dict(os.environ)),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"sbatch refused the job (--dry-run prints the script):\n{done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _record(job: Job, job_id: str) -> RunStopped | None:
    """Write the number of an accepted job into job.json, by which a second launch learns of it.

    If that fails, the job is cancelled and RunStopped raised: nothing would keep a second job out of the folder. The
    error is returned instead if the job could not be cancelled, and so will run.
    """
    path = job.folder / "job.json"
    try:
        publish(path, dataclasses.replace(job, job_id=job_id).to_json().encode())
        return None
    except (OSError, KeyboardInterrupt) as error:
        explained = explain(error)
        reason = explained.message if explained is not None else "interrupted"
        if _scancel(job_id):
            raise RunStopped(
                f"{reason}. Slurm had accepted job {job_id}; it was cancelled, because {path} does not name it"
            ) from error
        return RunStopped(
            f"{reason}. Slurm has accepted job {job_id}, and scancel failed; {path} does not name the job, so a second "
            f"launch would not notice it. Cancel it with: scancel {job_id}, or start nothing in {job.folder} until it "
            "has ended"
        )


def _scancel(job_id: str) -> bool:
    """Cancel a job; False if Slurm did not take the request."""
    try:
        return subprocess.run(["scancel", job_id], capture_output=True).returncode == 0
    except OSError:
        return False


def without_job_variables(environ: dict[str, str]) -> dict[str, str]:
    """`environ` without the variables of an enclosing Slurm job, which would change the options of a new job."""
    if "SLURM_JOB_ID" not in environ:
        return environ
    return {name: value for name, value in environ.items() if not re.match(r"(SLURM|SBATCH|SRUN|PMI)_", name)}


def job_state(job_id: str) -> tuple[str, int]:
    """(state, exit code) from `scontrol show job`; the state is UNKNOWN if scontrol does not answer for the job."""
    output = scontrol_show(job_id)
    code = re.search(r"\bExitCode=(\d+):(\d+)", output)
    return slurm_field(output, "JobState") or "UNKNOWN", (int(code[1]) if code else 1)


def wait_for(job_id: str, job: Job, console: Console) -> int:
    """Print the job's state changes until it has ended; returns its exit code."""
    previous, unknown = "", 0
    try:
        while True:
            state, code = job_state(job_id)
            unknown = unknown + 1 if state == "UNKNOWN" else 0
            if unknown == UNKNOWN_ATTEMPTS:
                log = job.folder / f"slurm-{job_id}.log"
                print_line(
                    console,
                    f"job {job_id}: scontrol no longer knows the job; see how it ended in {log}",
                )
                return FAILED
            if state != previous and not unknown:
                print_line(console, f"job {job_id}: {state.lower()}")
                previous = state
            if state in SLURM_END_STATES:
                return DONE if state == "COMPLETED" else code if code in (USER_ERROR, RUN_AGAIN) else FAILED
            time.sleep(POLL_SECONDS * 2 ** max(0, unknown - 1))
    except KeyboardInterrupt:
        print_line(console, f"job {job_id} continues to run; `scancel {job_id}` ends it")
        return FAILED

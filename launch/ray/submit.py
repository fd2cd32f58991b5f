"""Ray backend: submits a job to the job API of a Ray cluster, where its driver (driver.py) supervises the ranks."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import secrets
import shlex
import time
import zlib
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from data_pipeline.errors import UserError
from launch.cluster import RayCluster, parse_cluster
from launch.job import Job
from launch.supervise.output import print_line
from pretrain.recipe.dump import dump
from pretrain.recipe.plugins import VARIABLE
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, FAILED, RUN_AGAIN, USER_ERROR

POLL_SECONDS = 2.0
# Environment variable that carries job and recipe to the driver: the cluster may not see the disks of the machine
# that submits.
PAYLOAD = "DROMOS_JOB"
# Linux allows 131,072 bytes in one variable, and Ray puts a job's whole environment into one variable.
MAX_ENV_BYTES = 120_000


def render(job: Job) -> str:
    """The submission as text: address, entrypoint, the driver's environment, and the commands it will start."""
    request = submission(job, recipe="(the resolved recipe)")
    lines = [
        f"address: {address(job, required=False) or 'from RAY_API_SERVER_ADDRESS or RAY_ADDRESS'}",
        f"entrypoint: {request['entrypoint']}",
        *(
            f"env: {name}={value}"
            for name, value in request["runtime_env"]["env_vars"].items()
            if name != PAYLOAD
        ),
        f"placement: {job.nodes} x {bundle(job)}, one actor per rank",
        *(
            f"{stage.name}: {shlex.join(job.train_command(stage.name))}"
            if stage.kind == "train"
            else f"{stage.name}: merge"
            for stage in job.stages
        ),
        "job: " + job.to_json().rstrip(),
    ]
    return "\n".join(lines) + "\n"


def cluster_of(job: Job) -> RayCluster:
    """The job's cluster file."""
    cluster = parse_cluster(dict(job.cluster))
    assert isinstance(cluster, RayCluster)
    return cluster


def bundle(job: Job) -> dict[str, float]:
    """Resources of the ranks of one node."""
    cpus = {"CPU": float(cluster_of(job).cpus_per_rank * job.ranks_per_node)}
    return {**cpus, "GPU": float(job.ranks_per_node)} if job.gpus_per_node else cpus


def address(job: Job, required: bool = True) -> str | None:
    """Address of the job API: from the cluster file, else from the variables that `ray job submit` reads.

    Raises UserError if it is `required` and missing.
    """
    named = (
        cluster_of(job).address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    )
    if named is None and required:
        raise UserError(
            "--on ray: no cluster address; write it as http://HEAD:8265 into a --cluster file "
            "or set RAY_API_SERVER_ADDRESS"
        )
    return named


def submission(job: Job, recipe: str) -> dict[str, Any]:
    """Arguments of JobSubmissionClient.submit_job. Raises UserError if the recipe is too large for a Ray job."""
    payload = pack_payload(job, recipe)
    # Ray's default of 3 s is too short for a save.
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(cluster_of(job).stop_seconds)}
    # sbatch passes the environment of the person who submits; a Ray job has none of it.
    plugins = {VARIABLE: os.environ[VARIABLE]} if os.environ.get(VARIABLE) else {}
    env = {**plugins, **job.env, **stop, PAYLOAD: payload}
    if (size := len(json.dumps(env))) > MAX_ENV_BYTES:
        raise UserError(
            f"--on ray: the recipe and the cluster file's env take {size:,} bytes when packed, and a Ray job "
            f"carries at most {MAX_ENV_BYTES:,}; move stages, or evaluations with many classes, to a separate recipe"
        )
    return {
        "entrypoint": f"cd {shlex.quote(job.workdir)} && exec {shlex.quote(job.python)} -P -m launch.ray.driver",
        "submission_id": job.job_id,
        "runtime_env": {"env_vars": env},
        "metadata": {"dromos_run": job.name, "dromos_run_dir": job.run_dir, "dromos_workdir": job.workdir},
    }


def pack_payload(job: Job, recipe: str) -> str:
    """Job and recipe as compressed ASCII text; `read_payload` is the inverse."""
    text = json.dumps({"job": json.loads(job.to_json()), "recipe": recipe})
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def read_payload(payload: str) -> tuple[Job, str]:
    """(job, text of the resolved recipe)."""
    values = json.loads(zlib.decompress(base64.b64decode(payload)))
    return Job.from_json(json.dumps(values["job"])), values["recipe"]


def submit(job: Job, recipe: Recipe, console: Console, wait: bool = False) -> int:
    """Submit the job and print how to follow and stop it; returns the exit code.

    With `wait`, prints the job's log until it has ended. Raises UserError if the cluster does not accept the job, or
    has a job of the same run folder that has not ended.
    """
    api = address(job)
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise UserError("--on ray needs Ray; install it with: pip install 'dromos[ray]'") from None
    job = dataclasses.replace(job, job_id=new_id(job))
    try:
        client = JobSubmissionClient(api)
        check_jobs(client, job, api)
        client.submit_job(**submission(job, dump(recipe)))
    except UserError:
        raise
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--on ray: the cluster at {api} did not accept the job: {error}") from None
    print_line(console, f"submitted job {job.job_id} to {api}: {job.nodes} x {job.ranks_per_node} ranks")
    print_line(console, f"log: ray job logs --address {api} --follow {job.job_id}")
    print_line(console, f"save and stop: ray job stop --address {api} {job.job_id}")
    for stage in job.stages:
        print_line(console, f"ranks: {job.run_dir}/{stage.name}/logs/rank_N.log on the cluster")
    return wait_for(client, job, console) if wait else DONE


def check_jobs(client: Any, job: Job, api: str | None) -> None:
    """Raise UserError if a job of the same run folder waits or runs on the cluster.

    Of two jobs that are submitted at the same instant, the driver of one takes the folder's lock; the other one ends.
    """
    for other in client.list_jobs():
        metadata = other.metadata or {}
        same = metadata.get("dromos_run_dir") == job.run_dir
        if (
            not same
            or metadata.get("dromos_workdir", job.workdir) != job.workdir
            or other.status.is_terminal()
        ):
            continue
        details = [other.status.value.lower()]
        if other.start_time:
            started = datetime.fromtimestamp(other.start_time / 1000, UTC)
            details.append(f"since {started:%Y-%m-%d %H:%M:%S} UTC")
        if other.driver_info:
            details.append(f"pid {other.driver_info.pid} on {other.driver_info.node_ip_address}")
        name = other.submission_id
        raise UserError(
            f"{job.run_dir} belongs to Ray job {name} ({', '.join(details)}). Follow it with: ray job logs --address "
            f"{api} --follow {name}. Wait for it, stop it with: ray job stop --address {api} {name} (it saves first), "
            "or choose another run.dir."
        )


def new_id(job: Job) -> str:
    """A job id with the run's name and the time, unique per submission."""
    name = "".join(char if char.isalnum() else "-" for char in job.name)
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def wait_for(client: Any, job: Job, console: Console) -> int:
    """Print the driver's log as it grows until the job has ended; returns the job's exit code."""
    printed = 0
    try:
        while True:
            status = client.get_job_status(job.job_id)
            logs = client.get_job_logs(job.job_id)
            end = len(logs) if status.is_terminal() else logs.rfind("\n") + 1  # whole lines while it runs
            if new := logs[printed:end]:
                console.file.write(new)
                console.file.flush()
                printed += len(new)
            if status.is_terminal():
                info = client.get_job_info(job.job_id)
                print_line(console, f"job {job.job_id}: {status.value.lower()}")
                return exit_code(status.value, info.driver_exit_code, info.message, console)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print_line(
            console, f"job {job.job_id} continues to run; `ray job stop {job.job_id}` saves and stops it"
        )
        return FAILED


def exit_code(status: str, code: int | None, message: str | None, console: Console) -> int:
    """Exit code of `dromos run` for the end of a Ray job. A stopped job can resume: its ranks save before
    they end, unless `stop_seconds` are too short."""
    if status == "SUCCEEDED":
        return DONE
    if status == "STOPPED":
        return RUN_AGAIN
    if code in (USER_ERROR, RUN_AGAIN):
        return code
    if code is None and message:
        print_line(console, message)
    return FAILED

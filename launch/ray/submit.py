"""The Ray door: submits a job to a Ray cluster's job API; its driver (ray_driver.py) supervises the ranks there."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import secrets
import shlex
import time
import zlib
from typing import Any

from rich.console import Console

from data_pipeline.errors import UserError
from launch.cluster import RayCluster, parse_cluster
from launch.job import Job
from launch.supervise.stage_runner import say
from pretrain.recipe.dump import dump
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, FAILED, GO_ON, USER_ERROR

POLL_SECONDS = 2.0
PAYLOAD = "DROMOS_JOB"
"""Environment variable that carries job and recipe to the driver: the cluster need not see the submitter's disks."""
ENV_BYTES = 120_000
"""Linux takes 131,072 bytes for one variable, and Ray puts a job's whole environment into one of its own."""


def render(job: Job) -> str:
    """The submission: address, entrypoint, the driver's environment, and what the driver will start."""
    request = submission(job, recipe="(the resolved recipe)")
    lines = [
        f"address: {address(job, required=False) or 'from RAY_API_SERVER_ADDRESS or RAY_ADDRESS'}",
        f"entrypoint: {request['entrypoint']}",
        *(
            f"env: {name}={value}"
            for name, value in request["runtime_env"]["env_vars"].items()
            if name != PAYLOAD
        ),
        f"placement: {job.nodes} x {bundle(job)}, one actor a rank",
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
    cluster = parse_cluster(dict(job.cluster))
    assert isinstance(cluster, RayCluster)
    return cluster


def bundle(job: Job) -> dict[str, float]:
    """Resources of the ranks of one node."""
    cpus = {"CPU": float(cluster_of(job).cpus_per_rank * job.ranks_per_node)}
    return {**cpus, "GPU": float(job.ranks_per_node)} if job.gpus_per_node else cpus


def address(job: Job, required: bool = True) -> str | None:
    """Where the job API listens, as `ray job submit` looks for it, the cluster file first."""
    named = (
        cluster_of(job).address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    )
    if named is None and required:
        raise UserError(
            "--on ray: no cluster is named; write its address, http://HEAD:8265, in a --cluster file "
            "or into RAY_API_SERVER_ADDRESS"
        )
    return named


def submission(job: Job, recipe: str) -> dict[str, Any]:
    """Arguments of JobSubmissionClient.submit_job."""
    payload = pack_payload(job, recipe)
    stop = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(cluster_of(job).stop_seconds)
    }  # Ray's own 3 s are too short for a save
    env = {**job.env, **stop, PAYLOAD: payload}
    if (size := len(json.dumps(env))) > ENV_BYTES:
        raise UserError(
            f"--on ray: the recipe and the cluster file's env take {size:,} bytes when packed, and a job of Ray "
            f"carries at most {ENV_BYTES:,}; move stages, or evaluations with many classes, to a recipe of their own"
        )
    return {
        "entrypoint": f"cd {shlex.quote(job.workdir)} && exec {shlex.quote(job.python)} -P -m launch.ray.driver",
        "submission_id": job.job_id,
        "runtime_env": {"env_vars": env},
        "metadata": {"dromos_run": job.name, "dromos_run_dir": job.run_dir},
    }


def pack_payload(job: Job, recipe: str) -> str:
    text = json.dumps({"job": json.loads(job.to_json()), "recipe": recipe})
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def read_payload(payload: str) -> tuple[Job, str]:
    """The job and the resolved recipe's text."""
    values = json.loads(zlib.decompress(base64.b64decode(payload)))
    return Job.from_json(json.dumps(values["job"])), values["recipe"]


def submit(job: Job, recipe: Recipe, console: Console, wait: bool = False) -> int:
    """Submit the job and say how to follow it; with `wait`, print its log until it has ended."""
    where = address(job)
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise UserError("--on ray needs Ray; install it with: pip install 'dromos[ray]'") from None
    job = dataclasses.replace(job, job_id=new_id(job))
    try:
        client = JobSubmissionClient(where)
        client.submit_job(**submission(job, dump(recipe)))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--on ray: the cluster at {where} did not take the job: {error}") from None
    say(console, f"submitted job {job.job_id} to {where}: {job.nodes} x {job.ranks_per_node} ranks")
    say(console, f"log: ray job logs --address {where} --follow {job.job_id}")
    say(console, f"save and stop: ray job stop --address {where} {job.job_id}")
    for stage in job.stages:
        say(console, f"ranks: {job.run_dir}/{stage.name}/logs/rank_N.log on the cluster")
    return wait_for(client, job, console) if wait else DONE


def new_id(job: Job) -> str:
    """Tells run and time, and is new at every submission."""
    name = "".join(char if char.isalnum() else "-" for char in job.name)
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def wait_for(client: Any, job: Job, console: Console) -> int:
    """Print the driver's lines as they come; its exit code is ours."""
    said = 0
    try:
        while True:
            status = client.get_job_status(job.job_id)
            logs = client.get_job_logs(job.job_id)
            whole = logs[said : logs.rfind("\n") + 1] if not status.is_terminal() else logs[said:]
            if whole:
                console.file.write(whole)
                console.file.flush()
                said += len(whole)
            if status.is_terminal():
                info = client.get_job_info(job.job_id)
                say(console, f"job {job.job_id}: {status.value.lower()}")
                return exit_code(status.value, info.driver_exit_code, info.message, console)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        say(console, f"job {job.job_id} goes on; `ray job stop {job.job_id}` saves and stops it")
        return FAILED


def exit_code(status: str, code: int | None, message: str | None, console: Console) -> int:
    """The driver's exit code; a stopped job has saved."""
    if status == "SUCCEEDED":
        return DONE
    if status == "STOPPED":
        return GO_ON
    if code in (USER_ERROR, GO_ON):
        return code
    if code is None and message:
        say(console, message)
    return FAILED

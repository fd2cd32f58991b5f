"""One launch at a time in a run folder: the launcher, or the job that it submitted, holds the folder's lock.

A Slurm job that waits in the queue holds no lock; job.json names it and Slurm is asked.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from data_pipeline.errors import UserError
from launch.job import Job
from launch.supervise.output import print_line
from pretrain.run.folder import json_mapping
from pretrain.run.lock import GRACE_SECONDS, FolderLock, boot_id, check_unlocked, describe_record

SLURM_END_STATES = [
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


@contextmanager
def run_lock(job: Job, console: Console, wait: float = GRACE_SECONDS) -> Iterator[FolderLock]:
    """Hold the lock of the run folder, which is created if it is missing.

    Raises UserError if another launch or a job in the queue writes into the folder. After an error in the block, a lock
    file and folders that were new are removed if nothing else is in them: a refused launch leaves no trace.
    """
    missing = [folder for folder in (job.folder, *job.folder.parents) if not folder.exists()]
    lock = FolderLock(job.folder, wait, about=about(job))
    try:
        check_stages(job)
        check_queue(job)
        if lock.left_by and "job" not in lock.left_by:
            end = "has ended" if lock.left_by.get("boot") == boot_id() else "was cut off"
            print_line(
                console,
                f"the launch before ({describe_record(lock.left_by)}) {end} without releasing {lock.path}; "
                "its lock does not count any more",
            )
        yield lock
    except BaseException:
        lock.release(remove=lock.created)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
    lock.release()


def check_free(job: Job) -> None:
    """Raise UserError if another launch or a job in the queue writes into the run folder. Writes nothing."""
    check_unlocked(job.folder)
    check_stages(job)
    check_queue(job)


def check_stages(job: Job) -> None:
    """Raise UserError if a rank that was started without a launcher (torchrun) trains one of the stages."""
    for stage in job.stages:
        check_unlocked(job.folder / stage.name)


def about(job: Job) -> dict[str, str]:
    """What a second launch says about this one."""
    run = shlex.quote(str(job.folder))
    if job.on == "ray" and job.job_id:
        return {
            "what": f"Ray job {job.job_id}",
            "job": job.job_id,
            "follow": f"ray job logs --follow {job.job_id}",
            "stop": f"ray job stop {job.job_id}",
        }
    return {
        "what": "dromos run",
        "follow": f"dromos status {run}",
        "stop": f"kill {os.getpid()} (it saves first)",
    }


def about_slurm(folder: Path, job_id: str) -> dict[str, str]:
    """What a second launch says about a running Slurm job."""
    return {
        "what": f"Slurm job {job_id}",
        "job": job_id,
        "follow": f"tail -f {shlex.quote(str(folder / f'slurm-{job_id}.log'))}",
        "stop": f"scancel {job_id} (it saves first)",
    }


def check_queue(job: Job) -> None:
    """Raise UserError if the Slurm job in the folder's job.json has not ended. Passes where Slurm cannot be asked."""
    content = json_mapping(job.folder / "job.json")
    job_id = content.get("job_id")
    if content.get("on") != "slurm" or not isinstance(job_id, str) or shutil.which("scontrol") is None:
        return
    shown = scontrol_show(job_id)
    state = slurm_field(shown, "JobState")
    if state is None or state in SLURM_END_STATES:
        return
    times = {"submitted": slurm_field(shown, "SubmitTime"), "started": slurm_field(shown, "StartTime")}
    if state == "PENDING":  # Slurm's estimate
        times.pop("started")
    where = slurm_field(shown, "BatchHost")
    details = [state.lower(), *(f"{name} {time}" for name, time in times.items() if time)]
    if where:
        details.append(f"on {where}")
    advice = about_slurm(job.folder, job_id)
    raise UserError(
        f"{job.folder} belongs to Slurm job {job_id} ({', '.join(details)}). Follow it with: squeue --jobs {job_id}, "
        f"or {advice['follow']}. Wait for it, stop it with: {advice['stop']}, or choose another run.dir."
    )


def scontrol_show(job_id: str) -> str:
    """The output of `scontrol show job`; empty if Slurm does not know the job or does not answer."""
    return subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True).stdout


def slurm_field(shown: str, name: str) -> str | None:
    """A value in the output of `scontrol show job -o`."""
    found = re.search(rf"(?:^|\s){name}=(\S+)", shown)
    return found[1] if found else None

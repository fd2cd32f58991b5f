"""Merge stages that never end, in place of real ones: what test_merge_stage.py runs in a process and stops."""

from __future__ import annotations

import time
from pathlib import Path

from launch.run import run
from pretrain import merge_stage


def slow_merge(*arguments: object) -> None:
    Path("started").touch()
    time.sleep(60)


def merge_locally(path: str) -> int:
    merge_stage.run_merge_stage = slow_merge
    return run(path, stages=["mix"], ranks_per_node=1)


def merge_under_slurm(path: str) -> int:
    from launch.slurm.job_step import main

    merge_stage.run_merge_stage = slow_merge
    return main(["merge", path, "mix"])

"""`dromos run`: from a recipe and flags to a job that is checked before it goes through one of the doors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console

from data_pipeline.errors import UserError
from launch import preflight
from launch.cluster import RayCluster, SlurmCluster, load_cluster
from launch.environment import gpu_count
from launch.job import Job, Where, recipe_id
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe, run_dir
from pretrain.recipe.schema import Recipe

BACKENDS = ("local", "slurm", "ray")


def run(
    recipe_path: str,
    on: str = "local",
    stages: Sequence[str] | None = None,
    nodes: int | None = None,
    ranks_per_node: int | None = None,
    cluster_file: str | None = None,
    dry_run: bool = False,
    overrides: Sequence[str] = (),
    wait: bool = False,
) -> int:
    """Run the stages of a recipe in order; the exit code is 0, 2, 75 or 1. Raises UserError."""
    recipe = load_recipe(recipe_path, list(overrides), list(stages) if stages else None, strict=True)
    job = make_job(recipe, recipe_path, on, stages, nodes, ranks_per_node, cluster_file, overrides)
    preflight.check_ranks(recipe, job)
    console = Console()
    if dry_run:
        console.file.write(render(job))
        return 0
    if job.on != "ray":  # a Ray cluster may see other disks than the machine that submits
        preflight.check(recipe, job)
    if job.on == "slurm":
        from launch.slurm import sbatch

        return sbatch.submit(job, recipe, console, wait)
    if job.on == "ray":
        from launch.ray.submit import submit

        return submit(job, recipe, console, wait)
    from launch import local

    return local.run(job, recipe, console)


def render(job: Job) -> str:
    """What the job comes down to: what is submitted, to the letter; of a local job, its ranks' commands, which the
    launcher ties to itself and to a port that is free when they start."""
    if job.on == "slurm":
        from launch.slurm import sbatch

        return sbatch.render(job)
    if job.on == "ray":
        from launch.ray.submit import render as render_ray

        return render_ray(job)
    from launch import local

    return local.render(job)


def make_job(
    recipe: Recipe,
    recipe_path: str,
    on: str = "local",
    stages: Sequence[str] | None = None,
    nodes: int | None = None,
    ranks_per_node: int | None = None,
    cluster_file: str | None = None,
    overrides: Sequence[str] = (),
) -> Job:
    """The job as data. Ranks a node default to one a GPU, else 1."""
    where = _where(on)
    if where == "local" and (nodes or 1) != 1:
        raise UserError(f"--nodes {nodes}: several nodes need --on slurm or --on ray")
    for flag, number in (("--nodes", nodes), ("--ranks-per-node", ranks_per_node)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: at least 1")
    cluster = _cluster(where, cluster_file)
    gpus = gpu_count() if where == "local" else cluster.gpus_per_node if cluster else 0
    ranks = ranks_per_node or max(1, gpus)
    if gpus and ranks > gpus:
        raise UserError(f"--ranks-per-node {ranks}: a node has {gpus} GPUs, and a rank needs one of its own")
    selected = [name for name in recipe.stages if not stages or name in stages]
    return Job(
        recipe=recipe_path,
        run_dir=str(run_dir(recipe)),
        name=recipe.run.name,
        stages=tuple(preflight.stage_job(recipe, name) for name in selected),
        overrides=tuple(overrides),
        on=where,
        nodes=nodes or 1,
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        python=(cluster.python if cluster and where != "local" else None) or sys.executable,
        workdir=(cluster.workdir if cluster and where != "local" else None) or os.getcwd(),
        env=dict(cluster.env) if cluster else {},
        cluster=cluster.model_dump(mode="json", exclude_none=True) if cluster else {},
        cluster_file=cluster_file,
        recipe_id=None if where == "local" else recipe_id(dump(recipe)),
    )


def _where(on: str) -> Where:
    if on not in BACKENDS:
        raise UserError(f"--on {on}: is none of {', '.join(BACKENDS)}")
    return on  # type: ignore[return-value]


def _cluster(where: Where, cluster_file: str | None) -> SlurmCluster | RayCluster | None:
    """Of a local job, a cluster file says only which Ray its loader reads through."""
    if where == "local":
        return load_cluster(cluster_file, "ray") if cluster_file else None
    return load_cluster(cluster_file, where)

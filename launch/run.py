"""`dromos run`: turns a recipe and flags into a checked job, and hands it to a backend."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console

from data_pipeline.errors import UserError
from launch import preflight
from launch.cluster import RayCluster, SlurmCluster, load_cluster
from launch.environment import gpu_count
from launch.job import Backend, Job, recipe_id
from launch.run_lock import check_free
from launch.stage_state import stage_job
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
    """Run the stages of a recipe in order; returns the exit code 0, 2, 75 or 1. Raises UserError."""
    recipe = load_recipe(recipe_path, list(overrides), list(stages) if stages else None, strict=True)
    job = make_job(recipe, recipe_path, on, stages, nodes, ranks_per_node, cluster_file, overrides)
    console = Console()
    if dry_run:
        console.file.write(render(job))
        return 0
    if job.on == "ray":  # the job's driver runs the checks: the cluster may see other disks than this machine
        from launch.ray.submit import submit

        return submit(job, recipe, console, wait)
    check_free(job)  # before the other checks: a run that is live may not have written all that they look for
    states = preflight.check(recipe, job)
    if job.on == "slurm":
        from launch.slurm import sbatch

        return sbatch.submit(job, recipe, console, wait)
    from launch import local

    return local.run(job, recipe, states, console)


def render(job: Job) -> str:
    """The dry run: the exact text that is submitted, or the commands of the ranks of a local job."""
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
    """The job as data. The default is one rank per GPU, or one rank per node without GPUs. Raises UserError."""
    backend = _backend(on)
    if backend == "local" and (nodes or 1) != 1:
        raise UserError(f"--nodes {nodes}: several nodes need --on slurm or --on ray")
    for flag, number in (("--nodes", nodes), ("--ranks-per-node", ranks_per_node)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: must be at least 1")
    cluster = _cluster(backend, cluster_file)
    gpus = gpu_count() if backend == "local" else cluster.gpus_per_node if cluster else 0
    ranks = ranks_per_node or max(1, gpus)
    if gpus and ranks > gpus:
        raise UserError(f"--ranks-per-node {ranks}: a node has {gpus} GPUs, and every rank needs its own GPU")
    selected = [name for name in recipe.stages if not stages or name in stages]
    return Job(
        recipe=recipe_path,
        run_dir=str(run_dir(recipe)),
        name=recipe.run.name,
        stages=tuple(stage_job(recipe, name) for name in selected),
        overrides=tuple(overrides),
        on=backend,
        nodes=nodes or 1,
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        python=(cluster.python if cluster and backend != "local" else None) or sys.executable,
        workdir=(cluster.workdir if cluster and backend != "local" else None) or os.getcwd(),
        env=dict(cluster.env) if cluster else {},
        cluster=cluster.model_dump(mode="json", exclude_none=True) if cluster else {},
        cluster_file=cluster_file,
        recipe_id=None if backend == "local" else recipe_id(dump(recipe)),
    )


def _backend(on: str) -> Backend:
    if on not in BACKENDS:
        raise UserError(f"--on {on}: unknown backend; write one of {', '.join(BACKENDS)}")
    return on  # type: ignore[return-value]


def _cluster(backend: Backend, cluster_file: str | None) -> SlurmCluster | RayCluster | None:
    """The cluster file's content. For a local job it only names the Ray cluster that the loader uses."""
    if backend == "local":
        return load_cluster(cluster_file, "ray") if cluster_file else None
    return load_cluster(cluster_file, backend)

"""What a launcher writes into the run folder before the first stage: its recipes, job.json, env.json."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.storage import publish
from launch.environment import capture
from launch.job import Job
from pretrain.recipe import Recipe
from pretrain.recipe_load import dump


def open_run(job: Job, recipe: Recipe) -> None:
    """recipe.yaml is the resolved recipe, overrides laid in: itself a recipe that runs the same. It is the latest
    one; a submitted job reads a copy of its own, since it may start long after another was submitted."""
    job.folder.mkdir(parents=True, exist_ok=True)
    text = dump(recipe).encode()
    publish(job.folder / "recipe.yaml", text)
    if job.on != "local":
        publish(Path(job.workdir) / job.copy_of_recipe, text)
    publish(job.folder / "job.json", job.to_json().encode())
    publish(job.folder / "env.json", (json.dumps(capture(), indent=2) + "\n").encode())

"""What a launcher writes into the run folder before the first stage: recipe.yaml, job.json, env.json."""

from __future__ import annotations

import json

from data_pipeline.storage import publish
from launch.environment import capture
from launch.job import Job
from pretrain.recipe import Recipe
from pretrain.recipe_load import dump


def open_run(job: Job, recipe: Recipe) -> None:
    """recipe.yaml is the resolved recipe, overrides laid in: itself a recipe that runs the same."""
    job.folder.mkdir(parents=True, exist_ok=True)
    publish(job.folder / "recipe.yaml", dump(recipe).encode())
    publish(job.folder / "job.json", job.to_json().encode())
    publish(job.folder / "env.json", (json.dumps(capture(), indent=2) + "\n").encode())

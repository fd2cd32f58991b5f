"""What a launcher writes into the run folder before the first stage: its recipes, job.json, env.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish
from launch.environment import capture
from launch.job import Job
from pretrain.recipe.dump import dump
from pretrain.recipe.schema import Recipe


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


@contextmanager
def taken_back(job: Job, *names: str) -> Iterator[None]:
    """Leaves the run folder as it was if the block, which writes `names` and what open_run writes, raises UserError."""
    paths = [job.folder / name for name in ("recipe.yaml", "job.json", "env.json", *names)]
    paths.append(Path(job.workdir) / job.copy_of_recipe)
    before = {path: path.read_bytes() for path in paths if path.exists()}
    new = [folder for folder in (job.folder, *job.folder.parents) if not folder.exists()]
    try:
        yield
    except UserError:
        for path in paths:
            if path in before:
                publish(path, before[path])
            else:
                path.unlink(missing_ok=True)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise

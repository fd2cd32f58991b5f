"""Files that a launcher writes into the run folder before the first stage: recipes, job.json, env.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.storage.durable import make_folder
from data_pipeline.storage.files import publish
from launch.environment import capture
from launch.job import Job
from pretrain.recipe.dump import dump
from pretrain.recipe.schema import Recipe
from pretrain.run.failures import RunStopped


def open_run(job: Job, recipe: Recipe) -> None:
    """Create the run folder and write recipe.yaml, job.json and env.json.

    recipe.yaml is the resolved recipe of the latest job, overrides included, and is itself a complete recipe. A
    submitted job also gets a copy of its own: it may start long after another job was submitted.
    """
    make_folder(job.folder)
    text = dump(recipe).encode()
    publish(job.folder / "recipe.yaml", text)
    if job.on != "local":
        publish(Path(job.workdir) / job.recipe_copy, text)
    publish(job.folder / "job.json", job.to_json().encode())
    publish(job.folder / "env.json", (json.dumps(capture(), indent=2) + "\n").encode())


@contextmanager
def rollback_on_error(job: Job, *names: str) -> Iterator[None]:
    """Restore the run folder if the block raises UserError, OSError or RunStopped.

    Covers the files of `open_run` and `names`.
    """
    paths = [job.folder / name for name in ("recipe.yaml", "job.json", "env.json", *names)]
    paths.append(Path(job.workdir) / job.recipe_copy)
    before = {path: path.read_bytes() for path in paths if path.exists()}
    try:
        yield
    except (UserError, OSError, RunStopped):
        for path in paths:
            with suppress(OSError):  # the disk may be full
                if path not in before:
                    path.unlink(missing_ok=True)
                elif path.read_bytes() != before[path]:
                    publish(path, before[path])
        raise

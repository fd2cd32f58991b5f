"""A job as plain data: what runs, where, and with what. RUN/job.json holds it, the dry run prints it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Where = Literal["local", "slurm", "ray"]


@dataclass(frozen=True)
class StageJob:
    """One stage of the job. steps: the length that makes it done, or None where only the data tells."""

    name: str
    kind: Literal["train", "merge"]
    steps: int | None = None
    loader: Literal["local", "ray"] = "local"


@dataclass(frozen=True)
class Job:
    """Everything a launcher needs; equal jobs render to equal scripts."""

    recipe: str
    run_dir: str
    stages: tuple[StageJob, ...]
    overrides: tuple[str, ...] = ()
    name: str = "run"
    on: Where = "local"
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    python: str = "python"
    workdir: str = "."
    env: Mapping[str, str] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)
    cluster_file: str | None = None
    job_id: str | None = None
    recipe_id: str | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def copy_of_recipe(self) -> str:
        """Named after its content: a later submission into the same folder leaves it to this job."""
        return (
            f"{self.run_dir}/recipe-{self.recipe_id}.yaml"
            if self.recipe_id
            else f"{self.run_dir}/recipe.yaml"
        )

    @property
    def folder(self) -> Path:
        return Path(self.workdir) / self.run_dir

    def train_command(self, stage: str) -> list[str]:
        """What one rank of a training stage executes. A submitted job reads its own copy of the recipe, which
        has the overrides in it and which neither later edits of the user's file nor later submissions reach."""
        if self.on != "local":
            return [self.python, "-P", "-m", "launch.cli", "train", self.copy_of_recipe, "--stage", stage]
        return [
            self.python,
            "-P",
            "-m",
            "launch.cli",
            "train",
            self.recipe,
            "--stage",
            stage,
            *self.overrides,
        ]

    def go_on_command(self) -> list[str]:
        """What a person types to continue this job."""
        command = ["dromos", "run", self.recipe]
        if self.on != "local":
            command += ["--on", self.on]
        command += ["--stage", ",".join(stage.name for stage in self.stages)]
        if self.nodes != 1:
            command += ["--nodes", str(self.nodes)]
        command += ["--ranks-per-node", str(self.ranks_per_node)]
        if self.cluster_file:
            command += ["--cluster", self.cluster_file]
        return [*command, *self.overrides]

    def go_on(self) -> str:
        return shlex.join(self.go_on_command())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        stages = tuple(StageJob(**stage) for stage in values.pop("stages"))
        return cls(stages=stages, overrides=tuple(values.pop("overrides")), **values)


def recipe_id(dumped: str) -> str:
    """Tells one resolved recipe from another."""
    return hashlib.sha256(dumped.encode()).hexdigest()[:12]


def load_job(path: str | Path) -> Job:
    return Job.from_json(Path(path).read_text())

"""`Job`: what runs, where and with what, as plain data. Stored in RUN/job.json; the dry run prints it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Backend = Literal["local", "slurm", "ray"]


@dataclass(frozen=True)
class StageJob:
    """One stage of a job. steps: the training length, None where only the data determines it."""

    name: str
    kind: Literal["train", "merge"]
    steps: int | None = None
    loader: Literal["local", "ray"] = "local"


@dataclass(frozen=True)
class Job:
    """Everything that a backend needs. Equal jobs render to equal scripts."""

    recipe: str
    run_dir: str
    stages: tuple[StageJob, ...]
    overrides: tuple[str, ...] = ()
    name: str = "run"
    on: Backend = "local"
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
    def recipe_copy(self) -> str:
        """Path of the resolved recipe in the run folder.

        A submitted job has a copy named by its content, which later submissions do not overwrite.
        """
        name = f"recipe-{self.recipe_id}.yaml" if self.recipe_id else "recipe.yaml"
        return f"{self.run_dir}/{name}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.workdir) / self.run_dir

    def train_command(self, stage: str) -> list[str]:
        """The command of one rank of a training stage.

        A submitted job reads its own copy of the resolved recipe, which includes the overrides. Later edits of the
        user's file and later submissions do not change that copy.
        """
        command = [self.python, "-P", "-m", "launch.cli", "train"]
        if self.on != "local":
            return [*command, self.recipe_copy, "--stage", stage]
        return [*command, self.recipe, "--stage", stage, *self.overrides]

    def resume_command(self) -> str:
        """The command that a user types to resume this job, quoted for a shell."""
        command = ["dromos", "run", self.recipe]
        if self.on != "local":
            command += ["--on", self.on]
        command += ["--stage", ",".join(stage.name for stage in self.stages)]
        if self.nodes != 1:
            command += ["--nodes", str(self.nodes)]
        command += ["--ranks-per-node", str(self.ranks_per_node)]
        if self.cluster_file:
            command += ["--cluster", self.cluster_file]
        return shlex.join([*command, *self.overrides])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        stages = tuple(StageJob(**stage) for stage in values.pop("stages"))
        return cls(stages=stages, overrides=tuple(values.pop("overrides")), **values)


def recipe_id(dumped: str) -> str:
    """12 hex digits that identify the text of a resolved recipe."""
    return hashlib.sha256(dumped.encode()).hexdigest()[:12]

"""Cluster files: typed YAML with the address, resources and options of a Slurm or Ray cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from data_pipeline.errors import UserError
from pretrain.recipe.schema_errors import did_you_mean
from pretrain.recipe.yaml_file import load_yaml

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def numbers_to_text(env: Any) -> Any:
    """Turn numbers into text: YAML reads `OMP_NUM_THREADS: 1` as a number."""
    if not isinstance(env, dict):
        return env
    for name in env:
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise ValueError(
                f"{name!r} is not a valid name of an environment variable: use letters, digits and _"
            )
    numbers = {name: str(value) for name, value in env.items() if type(value) in (int, float)}
    return env | numbers


def absolute(path: str | None) -> str | None:
    if path is not None and not Path(path).is_absolute():
        raise ValueError("write an absolute path")
    return path


class Cluster(BaseModel):
    """Options of both kinds of cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus_per_node: int = Field(0, ge=0, description="GPUs requested on each node; 0 requests none.")
    cpus_per_rank: int = Field(1, ge=1, description="CPU cores of one rank, including its loader workers.")
    python: str | None = Field(None, description="Python on the nodes; default: the Python that submits.")
    workdir: Annotated[str | None, AfterValidator(absolute)] = Field(
        None,
        description="Working directory on the nodes, an absolute path; default: the current one. The machine that "
        "submits a Slurm job must see it: data, weights and the run folder are relative to it.",
    )
    env: Annotated[dict[str, str], BeforeValidator(numbers_to_text)] = Field(
        default_factory=dict, description="Environment of every rank. No secrets."
    )


def reject_number(value: Any) -> Any:
    """YAML reads an unquoted 12:00:00 as 43200, which Slurm would interpret as minutes."""
    if isinstance(value, int):
        raise ValueError('write the time limit in quotes, for example time: "12:00:00"')
    return value


class SlurmCluster(Cluster):
    """Options of the sbatch script."""

    kind: Literal["slurm"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Annotated[str | None, BeforeValidator(reject_number)] = Field(
        None, description="Time limit in Slurm's notation: minutes, 12:00:00 or 2-00:00:00."
    )
    signal_lead: int = Field(
        300,
        ge=10,
        description="Seconds before the time limit at which ranks save and stop: allow for one step and one save.",
    )
    requeue: bool = Field(True, description="Requeue the job if it stops before it is done.")
    max_requeues: int = Field(
        1000, ge=0, description="A job that was requeued this often is not requeued again."
    )
    setup: list[str] = Field(
        default_factory=list,
        description="Shell lines to run before the first stage, for example module load.",
    )
    extra: dict[str, str | int | bool] = Field(
        default_factory=dict, description="More sbatch options: exclusive: true, constraint: a100, mem: 0."
    )


class RayCluster(Cluster):
    """Addresses and timeouts of a Ray cluster. Tokens come only from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN."""

    kind: Literal["ray"] = "ray"
    address: str | None = Field(
        None,
        description="Address of the job API, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
    )
    gcs_address: str | None = Field(
        None,
        description="Address HEAD:6379, for jobs --on local whose loader uses this cluster.",
    )
    start_seconds: int = Field(600, ge=1, description="Seconds that a job waits for free nodes.")
    stop_seconds: int = Field(
        600, ge=1, description="Seconds that a stopped job may save before it is killed."
    )


AnyCluster = Annotated[SlurmCluster | RayCluster, Field(discriminator="kind")]
CLUSTER_KINDS: dict[str, type[SlurmCluster] | type[RayCluster]] = {"slurm": SlurmCluster, "ray": RayCluster}


def parse_cluster(values: dict[str, Any], where: str = "cluster") -> SlurmCluster | RayCluster:
    """Check `values`. UserError names the key, the problem, and the nearest existing key."""
    kind = values.get("kind")
    if kind not in CLUSTER_KINDS:
        raise UserError(
            f"{where}: kind: {kind!r} is unknown; write one of {', '.join(CLUSTER_KINDS)}, for example `kind: slurm`"
        )
    try:
        return TypeAdapter(AnyCluster).validate_python(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(_explain(item, where, CLUSTER_KINDS[kind]) for item in error.errors())
        ) from None


def load_cluster(path: str | None, kind: str) -> SlurmCluster | RayCluster:
    """Read the cluster file of a job that runs on `kind`; defaults without a file. Raises UserError."""
    if path is None:
        return CLUSTER_KINDS[kind].model_validate({})
    if not Path(path).is_file():
        raise UserError(f"--cluster {path}: no such file; configs/cluster/{kind}.yaml is an example")
    cluster = parse_cluster(load_yaml(path).values, path)
    if cluster.kind != kind:
        raise UserError(f"--cluster {path}: describes a {cluster.kind} cluster, but the job runs --on {kind}")
    return cluster


def _explain(item: Any, where: str, model: type[BaseModel]) -> str:
    """One line for one error of pydantic."""
    keys = [str(part) for part in item["loc"] if part not in CLUSTER_KINDS]
    name = ".".join(keys)
    if item["type"] != "extra_forbidden":
        return f"{where}: {name}: {item['msg']} (got {item['input']!r})"
    advice = did_you_mean(keys[-1], model.model_fields) or f"; known keys: {', '.join(model.model_fields)}"
    return f"{where}: unknown key {name}{advice}"

"""Runs as the entrypoint of a Ray job: places one actor a rank, supervises them, and trains nothing itself."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.errors import UserError
from launch import preflight
from launch.job import Job, StageJob
from launch.ray.rank_actor import RankActor
from launch.ray.submit import PAYLOAD, bundle, cluster_of, read_payload
from launch.run_folder import open_run
from launch.supervise.rank_group import LOST
from launch.supervise.stage_runner import log_path, run_stages, say, undone
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, USER_ERROR

ASK_SECONDS = 30.0
SAY_SECONDS = 30.0


class RayGroup:
    """Ranks in actors. An actor that does not answer any more makes its rank LOST."""

    poll_seconds = 0.5

    def __init__(self, actors: list[Any]) -> None:
        self.actors, self.size = actors, len(actors)
        self.ended: dict[int, int] = {}

    def codes(self) -> dict[int, int]:
        for rank, code in self._ask("poll").items():
            if code is not None:
                self.ended[rank] = code
        return dict(self.ended)

    def send(self, number: int) -> None:
        self._ask("send", number)

    def kill(self) -> None:
        self._ask("kill")

    def tail(self, rank: int) -> str:
        import ray

        try:
            return ray.get(self.actors[rank].tail.remote(), timeout=ASK_SECONDS)
        except ray.exceptions.RayError:
            return "(its node does not answer)"

    def _ask(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Answers of the ranks that have not ended; who fails to answer is lost."""
        import ray

        asked = {
            rank: getattr(actor, method).remote(*arguments)
            for rank, actor in enumerate(self.actors)
            if rank not in self.ended or method == "kill"
        }
        answers = {}
        for rank, reference in asked.items():
            try:
                answers[rank] = ray.get(reference, timeout=ASK_SECONDS)
            except ray.exceptions.RayError:
                self.ended.setdefault(rank, LOST)
        return answers


class Ranks:
    """The job's actors in rank order, in a placement group of one bundle a node: R ranks on each of N nodes."""

    def __init__(self, job: Job, console: Console) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.job = job
        self.placement = place(job, console)
        share = {name: amount / job.ranks_per_node for name, amount in bundle(job).items()}
        self.actors: list[Any] = []
        for rank in range(job.world_size):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=self.placement, placement_group_bundle_index=rank // job.ranks_per_node
            )
            actor = ray.remote(RankActor).options(
                num_cpus=share["CPU"],
                num_gpus=share.get("GPU", 0),
                scheduling_strategy=strategy,
                max_restarts=0,
            )
            self.actors.append(actor.remote())
        self.places = ray.get([actor.place.remote() for actor in self.actors])

    def start(self, stage: str, command: list[str]) -> RayGroup:
        """Start a rank in each actor; they meet at the first one's node."""
        import ray

        host = self.places[0][1]
        port: int = ray.get(self.actors[0].port.remote(host))
        logs = [str(log_path(self.job.folder / stage, rank)) for rank in range(len(self.actors))]
        ray.get(
            [
                actor.start.remote(command, self.env(rank, host, port), logs[rank], self.job.workdir)
                for rank, actor in enumerate(self.actors)
            ]
        )
        return RayGroup(self.actors)

    def env(self, rank: int, host: str, port: int) -> dict[str, str]:
        """A rank's own variables; the GPUs are those of all ranks of its node, among which LOCAL_RANK chooses."""
        import ray

        each = self.job.ranks_per_node
        first = rank // each * each
        gpus = [gpu for place in self.places[first : first + each] for gpu in place[2]]
        return {
            "OMP_NUM_THREADS": str(cluster_of(self.job).cpus_per_rank),
            **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {"DS_ACCELERATOR": "cpu"}),
            **self.job.env,
            "PYTHONUNBUFFERED": "1",
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % each),
            "WORLD_SIZE": str(self.job.world_size),
            "LOCAL_WORLD_SIZE": str(each),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }


def place(job: Job, console: Console) -> Any:
    """A placement group of the job's shape; says what it waits for, and gives up after `start_seconds`."""
    from ray.util.placement_group import placement_group

    group = placement_group([bundle(job)] * job.nodes, strategy="STRICT_SPREAD")
    began = said = time.monotonic()
    limit = cluster_of(job).start_seconds
    while not group.wait(1):
        now = time.monotonic()
        if now - began > limit:
            raise UserError(f"{wanted(job)} were not free within {limit} s; the cluster has {offered()}")
        if now - said > SAY_SECONDS:
            say(console, f"waiting for {wanted(job)}; the cluster has {offered()}")
            said = now
    return group


def wanted(job: Job) -> str:
    return f"{job.nodes} node(s) with {_amounts(bundle(job))} each"


def offered() -> str:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return (
        "; ".join(_amounts({k: n[k] for k in ("CPU", "GPU") if k in n}) or "no CPU" for n in nodes)
        or "no node"
    )


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def connect() -> Any:
    """Join the cluster as this job's driver. ray.init takes SIGTERM for itself; it is given back."""
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ray.init(log_to_driver=False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return ray


def run(job: Job, recipe: Recipe, console: Console) -> int:
    """All stages of the job; what the local door does, with actors in place of child processes."""
    preflight.check(recipe, job)
    todo = undone(job, recipe, console)
    if not todo:
        return DONE
    open_run(job, recipe)
    connect()
    ranks = Ranks(job, console)

    def start(stage: StageJob) -> RayGroup:
        return ranks.start(stage.name, job.train_command(stage.name))

    def merge(stage: StageJob) -> int:
        from pretrain.merge_stage import run_merge_stage

        run_merge_stage(recipe, stage.name, job.folder)
        return DONE

    return run_stages(job, todo, console, start, merge, job.go_on())


def main() -> int:
    """Job and recipe come in the environment; the run's copy of the recipe is where the ranks read it."""
    job, text = read_payload(os.environ.pop(PAYLOAD))
    try:
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # not the run folder, which is checked before it is written
            path = Path(folder) / "recipe.yaml"
            path.write_text(text)
            recipe = load_recipe(path, stage=[stage.name for stage in job.stages])
        return run(job, recipe, Console(width=120))
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

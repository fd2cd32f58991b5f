"""Entry point of a Ray job: places one actor per rank and supervises the ranks; trains nothing itself."""

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
from launch.run_lock import run_lock
from launch.supervise.output import print_line
from launch.supervise.rank_group import LOST
from launch.supervise.stage_runner import log_path, print_done, run_stages
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE
from pretrain.run.failures import explain, print_traceback, say
from pretrain.run.lock import WAIT_SECONDS

CALL_SECONDS = 30.0  # timeout of one call to an actor
WAITING_LINE_SECONDS = 30.0  # between two lines about missing resources


class RayGroup:
    """Ranks in Ray actors. A rank is LOST when a call to its actor fails."""

    poll_seconds = 0.5

    def __init__(self, actors: list[Any]) -> None:
        self.actors, self.size = actors, len(actors)
        self.ended: dict[int, int] = {}

    def codes(self) -> dict[int, int]:
        for rank, code in self._call("poll").items():
            if code is not None:
                self.ended[rank] = code
        return dict(self.ended)

    def send(self, number: int) -> None:
        self._call("send", number)

    def kill(self) -> None:
        self._call("kill")

    def tail(self, rank: int) -> str:
        import ray

        try:
            return ray.get(self.actors[rank].tail.remote(), timeout=CALL_SECONDS)
        except ray.exceptions.RayError:
            return "(its node does not respond)"

    def _call(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Call `method` of the actors whose ranks have not ended; returns the results by rank.

        `kill` is called on all actors.
        """
        import ray

        references = {
            rank: getattr(actor, method).remote(*arguments)
            for rank, actor in enumerate(self.actors)
            if rank not in self.ended or method == "kill"
        }
        results = {}
        for rank, reference in references.items():
            try:
                results[rank] = ray.get(reference, timeout=CALL_SECONDS)
            except ray.exceptions.RayError:
                self.ended.setdefault(rank, LOST)
        return results


class RankActors:
    """The job's actors in rank order, in a placement group with one bundle per node. Each bundle holds the ranks of
    its node.
    """

    def __init__(self, job: Job, console: Console) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.job = job
        self.placement = wait_for_placement(job, console)
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
        self.locations = ray.get([actor.location.remote() for actor in self.actors])

    def start(self, stage: str, command: list[str]) -> RayGroup:
        """Start a rank in every actor; the rendezvous is on the first actor's node."""
        import ray

        host = self.locations[0][1]
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
        """Variables of one rank. It sees the GPUs of all ranks of its node and takes the one of LOCAL_RANK."""
        import ray

        per_node = self.job.ranks_per_node
        first = rank // per_node * per_node
        gpus = [gpu for location in self.locations[first : first + per_node] for gpu in location[2]]
        return {
            "OMP_NUM_THREADS": str(cluster_of(self.job).cpus_per_rank),
            **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {"DS_ACCELERATOR": "cpu"}),
            **self.job.env,
            "PYTHONUNBUFFERED": "1",
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_node),
            "WORLD_SIZE": str(self.job.world_size),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }


def wait_for_placement(job: Job, console: Console) -> Any:
    """Wait for a placement group with one bundle per node.

    Prints what it waits for. Raises UserError after the cluster file's `start_seconds`.
    """
    from ray.util.placement_group import placement_group

    group = placement_group([bundle(job)] * job.nodes, strategy="STRICT_SPREAD")
    started = last_line = time.monotonic()
    limit = cluster_of(job).start_seconds
    while not group.wait(1):
        now = time.monotonic()
        if now - started > limit:
            raise UserError(f"{requested(job)} were not free within {limit} s; the cluster has {available()}")
        if now - last_line > WAITING_LINE_SECONDS:
            print_line(console, f"waiting for {requested(job)}; the cluster has {available()}")
            last_line = now
    return group


def requested(job: Job) -> str:
    """The resources of the job, for messages."""
    return f"{job.nodes} node(s) with {_amounts(bundle(job))} each"


def available() -> str:
    """The resources of the cluster's nodes, for messages."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return (
        "; ".join(_amounts({k: n[k] for k in ("CPU", "GPU") if k in n}) or "no CPU" for n in nodes)
        or "no node"
    )


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def connect() -> Any:
    """Connect to the cluster as this job's driver. Restores the signal handlers that ray.init replaces."""
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ray.init(log_to_driver=False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return ray


def run(job: Job, recipe: Recipe, console: Console) -> int:
    """Run the stages that remain, like the local backend, but with actors; returns the exit code."""
    states = preflight.check(recipe, job)
    print_done(job, states, console)
    if not states.remaining:
        return DONE
    with run_lock(job, console, WAIT_SECONDS):  # of a job that is still saving
        open_run(job, recipe)
        connect()
        actors = RankActors(job, console)

        def start(stage: StageJob) -> RayGroup:
            return actors.start(stage.name, job.train_command(stage.name))

        return run_stages(job, recipe, states.remaining, console, start, job.resume_command())


def main() -> int:
    """Run the job that the environment carries; returns the exit code. Ranks read the recipe from the run folder."""
    job, text = read_payload(os.environ.pop(PAYLOAD))
    try:
        # A temporary folder: the run folder is checked before anything is written into it.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(text)
            recipe = load_recipe(path, stage=[stage.name for stage in job.stages])
        return run(job, recipe, Console(width=120))
    except Exception as error:
        # An error in an actor is wrapped.
        failure = explain(error) or explain(getattr(error, "cause", None) or error)
        if failure is None:
            raise
        say(failure.message)
        print_traceback(error)
        return failure.code


if __name__ == "__main__":
    sys.exit(main())

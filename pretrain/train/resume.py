"""`continue: X`: a stage that takes over everything of another one: weights, optimizer, step count, data position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import StreamSpec
from data_pipeline.errors import UserError
from pretrain.distributed.collectives import from_first, gather
from pretrain.recipe.schema import TrainStage
from pretrain.run.address import locate
from pretrain.train import checkpoint


@dataclass(frozen=True)
class Start:
    """Where a training goes on: a complete checkpoint, its state.json, and the frozen tensors beside it."""

    checkpoint: Path
    step: int
    state: dict[str, Any]
    frozen: Path


def find_start(stage: TrainStage, folder: Path, world_size: int) -> Start | None:
    """The newest complete checkpoint of the stage's own `folder`, else of the stage that it continues.

    None for a stage that begins at step 0. Raises UserError for an address without optimizer state, or one that
    was trained with another world size or ZeRO stage.
    """
    own = from_first(checkpoint.complete_steps(folder / "checkpoints"))
    if own:
        path = folder / "checkpoints" / checkpoint.tag_of(own[-1])
        refuse_unseen(path)
        return Start(path, own[-1], checkpoint.verify(path), folder / "frozen.safetensors")
    if stage.continue_ is None:
        return None
    found = from_first(locate(stage.continue_, folder.parent))
    if found.kind != "checkpoint" or found.stage_dir is None or found.step is None:
        raise UserError(
            f"continue: {stage.continue_}: is no stage that was trained here, so there is no optimizer state to go on "
            f"with; take its weights alone with init: {stage.continue_}"
        )
    path = Path(found.path)
    refuse_unseen(path)
    state = checkpoint.verify(path)
    for key, now in (("world_size", world_size), ("zero", stage.engine.zero)):
        if state.get(key) != now:
            raise UserError(
                f"continue: {stage.continue_}: {path} was saved with {key} {state.get(key)}, this is {now}; "
                "changing it is not available yet: use the same, or take the weights alone with "
                f"init: {stage.continue_}"
            )
    return Start(path, found.step, state, found.stage_dir / "frozen.safetensors")


def refuse_unseen(path: Path) -> None:
    """A rank that does not see rank 0's checkpoint would start from something else, and no loss would tell."""
    missing = [number for number, there in enumerate(gather((path / "COMPLETE").exists())) if not there]
    if missing:
        raise UserError(
            f"{path}: rank {missing[0]} does not see this checkpoint, rank 0 does; run.dir must be on a file system "
            f"that all nodes share"
        )


def check_length(start: Start, stage: TrainStage, folder: Path, total: int) -> None:
    """UserError when a stage that continues another one would have nothing left to do."""
    if start.checkpoint.parent.parent != folder and start.step >= total:
        raise UserError(
            f"continue: {stage.continue_}: is at step {start.step} already, and this stage ends at step {total}; steps "
            f"count from the beginning of {stage.continue_}, so write a longer train"
        )


def resume_data(
    builders: Mapping[str, BatchBuilder], order: Mapping[str, Any], accept_change: bool
) -> tuple[dict[str, BatchBuilder], list[str]]:
    """Makers that go on where `order`, a checkpoint's, was written, and a line for every change that was accepted.

    Raises UserError, with both values of what differs, where data or mixture changed without `accept_change`.
    """
    if set(builders) != set(order):
        raise UserError(
            f"data: the checkpoint was trained on the streams {', '.join(sorted(order))}, the recipe has "
            f"{', '.join(sorted(builders))}; restore them, or start a new run folder"
        )
    going_on, changes = {}, []
    for name, builder in builders.items():
        try:
            resumed = builder.order.resume(order[name], builder.fingerprints, accept_change)
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        changes += [f"data.{name}: {line}" for line in resumed.changes]
        segments = resumed.segments
        going_on[name] = builder.with_spec(replace(builder.spec, segments=segments)) if segments else builder
    return going_on, changes


def same_order(specs: Sequence[StreamSpec], order: Mapping[str, Any], address: str) -> list[StreamSpec]:
    """The streams with the seeds of the checkpoint's order: the data goes on where the other stage left it."""
    if {spec.name for spec in specs} != set(order):
        raise UserError(
            f"continue: {address}: it was trained on the streams {', '.join(sorted(order))}, this stage has "
            f"{', '.join(sorted(spec.name for spec in specs))}; take the weights alone with init: {address}"
        )
    return [replace(spec, seed=int(order[spec.name]["seed"], 16)) for spec in specs]

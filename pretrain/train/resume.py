"""Where a training resumes: its own newest checkpoint, or that of the stage in `continue: X`.

`continue: X` takes over everything of another stage: weights, optimizer state, step count and data position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.order.saved_state import check_state
from pretrain.distributed.collectives import from_rank_0, gather
from pretrain.recipe.schema import TrainStage
from pretrain.run.address import locate
from pretrain.run.folder import complete_steps, tag_of
from pretrain.run.identity import read_record
from pretrain.train.checkpoint import verify_and_read_state


@dataclass(frozen=True)
class Start:
    """A verified checkpoint that a training starts from.

    checkpoint: its folder
    step:       optimizer steps done
    state:      its state.json
    frozen:     frozen.safetensors of the stage that wrote it; the file exists only if the stage froze something
    """

    checkpoint: Path
    step: int
    state: dict[str, Any]
    frozen: Path

    def was_written_by(self, stage_dir: Path) -> bool:
        """True when the stage in `stage_dir` wrote this checkpoint, False when it continues another stage."""
        return self.checkpoint.parent.parent == stage_dir


def find_start(stage: TrainStage, folder: Path, world_size: int) -> Start | None:
    """The newest complete checkpoint of the stage's own `folder`, else of the stage that it continues; collective.

    None for a stage that begins at step 0. Raises UserError for an address without optimizer state, or one that
    was trained with another world size, ZeRO stage, dtype or frozen parts.
    """
    own = from_rank_0(complete_steps(folder / "checkpoints"))
    if own:
        path = folder / "checkpoints" / tag_of(own[-1])
        check_visible_on_all_ranks(path)
        return Start(path, own[-1], _read_state(path), folder / "frozen.safetensors")
    if stage.continue_ is None:
        return None
    located = from_rank_0(locate(stage.continue_, folder.parent))
    if located.stage_dir is None or located.step is None:  # only a checkpoint has a step
        raise UserError(
            f"continue: {stage.continue_} is not a training stage of a run, so it has no optimizer state to "
            f"continue from; to take only its weights, write init: {stage.continue_}"
        )
    path = Path(located.path)
    check_visible_on_all_ranks(path)
    state = _read_state(path)
    for key, value in (("world_size", world_size), ("zero", stage.engine.zero)):
        if state.get(key) != value:
            raise UserError(
                f"continue: {stage.continue_}: {path} was saved with {key} {state.get(key)}, this run has {value}; "
                f"changing it is not available yet: use {key} {state.get(key)}, or take only the weights with "
                f"init: {stage.continue_}"
            )
    check_same_parameters(stage, located.stage_dir)
    return Start(path, located.step, state, located.stage_dir / "frozen.safetensors")


def check_same_parameters(stage: TrainStage, continued: Path) -> None:
    """Raise UserError when `continue:` would need optimizer state that the stage in `continued` does not have.

    Its checkpoint has state for the parameters that it trained only, by optimizer group and without their names, and
    fp32 weights beside those of its dtype.
    """
    record = (read_record(continued) or {}).get("stage", {})
    frozen = sorted((record.get("model") or {}).get("freeze") or [])
    groups = [group.get("match") for group in (record.get("optimizer") or {}).get("groups") or []]
    dtype = (record.get("engine") or {}).get("dtype", stage.engine.dtype)
    for key, was, now in (
        ("model.freeze", frozen, sorted(stage.model.freeze)),
        ("optimizer.groups", groups, [group.match for group in stage.optimizer.groups or []]),
        ("engine.dtype", dtype, stage.engine.dtype),
    ):
        if was != now:
            raise UserError(
                f"continue: {stage.continue_}: it was trained with {key} {was}, this stage has {now}; its optimizer "
                f"state fits no other value: restore {key}, or take only the weights with init: {stage.continue_}"
            )


def _read_state(path: Path) -> dict[str, Any]:
    """The state.json of a verified checkpoint; collective. Raises UserError for a damaged or absent data position."""
    state = verify_and_read_state(path)
    order = state.get("order")
    if not isinstance(order, dict) or not all(isinstance(each, dict) for each in order.values()):
        raise UserError(
            f"{path / 'state.json'} is damaged: it has no data position; remove {path.name} to resume from the "
            "checkpoint before it"
        )
    for name, position in order.items():
        try:
            check_state(position)
        except UserError as error:
            raise UserError(f"{path / 'state.json'}: stream {name}: {error}") from None
        if tag_of(position["step"]) != path.name:
            raise UserError(
                f"{path / 'state.json'} is damaged: its position of stream {name} is that of step {position['step']}; "
                f"remove {path.name} to resume from the checkpoint before it"
            )
    return state


def check_visible_on_all_ranks(path: Path) -> None:
    """Raise UserError when a rank does not see the checkpoint that rank 0 sees; collective.

    Such a rank would start from other weights, and the loss would not show it.
    """
    missing = [number for number, exists in enumerate(gather((path / "COMPLETE").exists())) if not exists]
    if missing:
        raise UserError(
            f"{path}: rank {missing[0]} does not see this checkpoint, rank 0 does; run.dir must be on a file system "
            f"that all nodes share"
        )


def check_length(start: Start, stage: TrainStage, folder: Path, total: int) -> None:
    """Raise UserError when a stage that continues another one has no steps left to train."""
    if not start.was_written_by(folder) and start.step >= total:
        raise UserError(
            f"continue: {stage.continue_} is at step {start.step} already, and this stage ends at step {total}; steps "
            f"count from the beginning of {stage.continue_}, so increase train.steps (or samples, epochs)"
        )


def resume_data(
    builders: Mapping[str, BatchBuilder], order: Mapping[str, Any], accept_change: bool
) -> tuple[dict[str, BatchBuilder], list[str]]:
    """Builders that continue at the data position of a checkpoint, and one line per accepted change of the data.

    `order` is the checkpoint's order state by stream. Raises UserError with the old and the new value where data or
    mixture changed without `accept_change`.
    """
    if set(builders) != set(order):
        raise UserError(
            f"data: the checkpoint was trained on the streams {', '.join(sorted(order))}, the recipe has "
            f"{', '.join(sorted(builders))}; restore them, or start a new run folder"
        )
    continued, changes = {}, []
    for name, builder in builders.items():
        try:
            resumed = builder.order.resume(order[name], builder.fingerprints, accept_change)
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        changes += [f"data.{name}: {line}" for line in resumed.changes]
        segments = resumed.segments
        continued[name] = builder.with_spec(replace(builder.spec, segments=segments)) if segments else builder
    return continued, changes


def with_order_of(specs: Sequence[StreamSpec], order: Mapping[str, Any], address: str) -> list[StreamSpec]:
    """The streams of this stage with the seeds of the continued stage, so that the sample order continues.

    Raises UserError when that stage had other streams.
    """
    if {spec.name for spec in specs} != set(order):
        raise UserError(
            f"continue: {address}: it was trained on the streams {', '.join(sorted(order))}, this stage has "
            f"{', '.join(sorted(spec.name for spec in specs))}; to take only its weights, write init: {address}"
        )
    return [replace(spec, seed=int(order[spec.name]["seed"], 16)) for spec in specs]

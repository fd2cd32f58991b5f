"""Steps of opening a training stage on one rank: model, streams, plan, restored state, run folder, loader.

`Session.train` calls them in this order. Before `prepare_folder` only the lock file is written, so that a wrong recipe
or a missing source leaves the rest of the run folder as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.errors import UserError
from data_pipeline.order.stream_order import StreamOrder
from data_pipeline.storage.durable import sync
from data_pipeline.storage.files import publish
from data_pipeline.transforms.decode import decoder_versions
from data_pipeline.workers.watchdog import StallLimits
from pretrain.build.freezing import check_streams_train, group_names, training_table
from pretrain.build.module_weights import has_whole, load_into, read_frozen, read_state, write_frozen
from pretrain.build.objective import Built, build
from pretrain.build.streams import cache_settings, stage_specs
from pretrain.build.tokenizer import check_tokens, optional_tokenizer
from pretrain.distributed.engine import Engine, ParameterGroup, Runtime
from pretrain.evaluate.suite import check_held_out, evaluate, flat_scalars
from pretrain.objectives.base import Objective
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.fields import Length
from pretrain.recipe.lengths import check_ends, length_steps, total_steps
from pretrain.recipe.parameter_names import folded
from pretrain.recipe.schema import Recipe, TrainStage
from pretrain.run import metrics_log
from pretrain.run.folder import LEFT_OUT, read_record
from pretrain.run.identity import compare_changeable_keys, compare_versions
from pretrain.train.checkpoint import hash_file
from pretrain.train.resume import Start, check_length, resume_data, with_order_of
from pretrain.train.schedule import peak_rate
from pretrain.train.trainer import GroupRate, Plan

if TYPE_CHECKING:
    from data_pipeline.loader.loader import Loader


@dataclass(frozen=True)
class StageContext:
    """Recipe, stage, run folder and runtime of a rank: the same for every step of the setup."""

    recipe: Recipe
    name: str
    stage: TrainStage
    run_dir: Path
    runtime: Runtime

    @property
    def folder(self) -> Path:
        """The stage's folder in the run folder."""
        return self.run_dir / self.name

    @property
    def frozen_path(self) -> Path:
        return self.folder / "frozen.safetensors"

    @property
    def record(self) -> dict[str, Any]:
        """The content of resolved.yaml: recipe, stage and versions of the image decoders."""
        return stage_record(self.recipe, self.name) | {"versions": decoder_versions()}


def check_frozen(start: Start) -> None:
    """Raise UserError if frozen.safetensors is not the file that the checkpoint of `start` was saved with."""
    if hash_file(start.frozen) != start.state.get("frozen"):
        raise UserError(
            f"{start.frozen} is not the file that {start.checkpoint.name} was saved with; restore it, or "
            f"{_start_again(start)}"
        )


def build_objective(context: StageContext, start: Start | None) -> Built:
    """The objective with the weights of its first step, but for `init:`; the engine moves it to the device.

    For a `start` that has passed `check_frozen`: its frozen.safetensors describes the encoder.
    """
    frozen = start.frozen if start is not None else None
    return build(context.stage, context.name, context.recipe.run.seed, context.run_dir, frozen)


def open_streams(
    context: StageContext, objective: Objective, start: Start | None
) -> tuple[dict[str, BatchBuilder], list[str]]:
    """A batch builder per stream, at the data position of `start`, and one line per accepted change of the data.

    Raises UserError when a source has no usable samples, or when data changed without run.accept_change.
    """
    stage = context.stage
    specs = stage_specs(stage, context.recipe.run.seed, context.name, objective.streams)
    if start is not None and stage.continue_ is not None:
        specs = with_order_of(specs, start.state["order"], stage.continue_)
    cache = cache_settings(stage)
    builders = {spec.name: BatchBuilder(spec, cache=cache) for spec in specs}
    for builder in builders.values():
        builder.check()  # the launcher checks too, but a rank may be started without it
    if start is None:
        return builders, []
    return resume_data(builders, start.state["order"], context.recipe.run.accept_change)


def make_plan(stage: TrainStage, order: StreamOrder) -> Plan:
    """Lengths of a stage in steps; `order` is that of the main stream, which knows the batches of earlier segments."""
    epoch, largest = order.samples_per_epoch(), order.batches.largest

    def interval(length: Length) -> int:
        """Steps of an interval; samples are counted in the largest global batch."""
        return max(1, length_steps(length, largest, epoch))

    peak, warmup = peak_rate(stage.optimizer, largest), stage.schedule.warmup
    return Plan(
        total=total_steps(stage, epoch, order),
        warmup=length_steps(warmup, order, epoch),
        peak_rate=peak,
        save_every=interval(stage.checkpoint.every),
        evaluate_every=interval(stage.eval.every) if stage.eval.every is not None else None,
        hours=stage.train.hours,
        groups=tuple(
            GroupRate(group.match, group.scale(peak), length_steps(group.warmup or warmup, order, epoch))
            for group in stage.optimizer.groups or []
        ),
    )


def check_stage(
    context: StageContext,
    objective: Objective,
    builders: dict[str, BatchBuilder],
    total: int,
    start: Start | None,
) -> None:
    """Checks that need the opened data and the model: lengths, held-out sources, tokens, what trains.

    Rank 0 prints what trains. Raises UserError.
    """
    for line in check_ends({name: builder.order for name, builder in builders.items()}, total):
        if context.runtime.rank == 0:
            print(f"dromos: {line}", flush=True)
    if start is not None:
        check_length(start, context.stage, context.folder, total)
    check_held_out(objective, context.stage)
    check_tokens(context.stage, objective, builders)
    check_streams_train(objective, context.stage)
    largest = builders[objective.main].order.batches.largest
    table = training_table(objective, context.stage, peak_rate(context.stage.optimizer, largest))
    if context.runtime.rank == 0:
        print("\n".join([f"dromos: {context.name} {table[0]}", *table[1:]]), flush=True)


def load_weights(context: StageContext, built: Built, start: Start | None) -> None:
    """Weights that the engine does not restore: `init` of a new stage, the frozen tensors of a resumed one.

    Raises UserError when frozen.safetensors is not the file that the checkpoint was saved with.
    """
    if start is not None:
        tensors = _frozen_of(start, built.objective)
        targets = built.objective.model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in targets:
                    targets[name].copy_(tensor)
    elif context.stage.init is not None:
        _init(context, built, context.stage.init)


def _init(context: StageContext, built: Built, init: str) -> None:
    """Take the weights at `init`; rank 0 prints what they lack and what of them is not used.

    A part that `built` has from elsewhere, such as an encoder from `model.vision.init`, is taken from `init` too if
    `init` has it whole: an earlier stage may have trained it. An encoder of another shape stays.
    """
    model, state = built.objective.model, read_state(init, context.run_dir)
    own = model.state_dict()
    elsewhere = {name: own[name].clone() for name in built.pretrained}
    left = {}
    if not has_whole(state, elsewhere):
        left = {name: state.pop(name) for name in elsewhere if name in state}
    loaded = load_into(model, state, init, context.stage.init_allow or [])
    if context.runtime.rank != 0:
        return
    replaced = [name for name, tensor in elsewhere.items() if not torch.equal(own[name], tensor)]
    unused = [*loaded.unused, *left]
    new = [name for name in loaded.new if name not in elsewhere]
    targets = {name for name, _ in model.named_parameters()}
    for what, names, others in (
        ("newly initialised", new, targets - {*new}),
        ("not used", unused, {*state, *left} - {*unused}),
        ("used in place of model.vision.init", replaced, {*own} - {*replaced}),
    ):
        if names:
            print(f"dromos: init {init}: {what}: {', '.join(folded(names, others))}", flush=True)


def _start_again(start: Start) -> str:
    return f"delete {start.checkpoint.parent.parent} to start again"


def _frozen_of(start: Start, objective: Objective) -> dict[str, Tensor]:
    """The tensors of the frozen.safetensors with which the checkpoint of `start` was saved: all that are frozen now.

    A checkpoint holds no frozen parameters, so one that the file lacks would silently stay as initialised.
    """
    tensors = read_frozen(start.frozen)
    missing = [name for name in objective.frozen() if name not in tensors]
    if missing:
        what = (
            "has no tensor"
            if start.state.get("frozen")
            else f"was not saved with {start.checkpoint.name}, and holds no tensor"
        )
        raise UserError(
            f"{start.frozen} {what} {missing[0]}, which this stage freezes; {_start_again(start)}, or write init: "
            "for a new stage that freezes other parts"
        )
    return tensors


def open_engine(context: StageContext, objective: Objective, start: Start | None) -> Engine:
    """The model under DeepSpeed, with weights and optimizer state of `start`; collective."""
    settings, optimizer = context.stage.engine, context.stage.optimizer
    groups = [
        ParameterGroup(names, optimizer.weight_decay if group.weight_decay is None else group.weight_decay)
        for names, group in zip(group_names(objective, optimizer), optimizer.groups or [], strict=True)
    ]
    engine = Engine(
        objective.model,
        settings.zero,
        settings.dtype,
        optimizer.betas,
        optimizer.eps,
        optimizer.weight_decay,
        optimizer.clip,
        context.runtime,
        groups,
    )
    if start is not None:
        engine.load(start.checkpoint.parent, start.checkpoint.name)
    return engine


def prepare_folder(
    context: StageContext,
    objective: Objective,
    frozen: dict[str, Tensor],
    description: dict[str, Any],
    start: Start | None,
    total: int,
    accepted: list[str],
) -> None:
    """Write the stage folder's files before the first step; on rank 0 only.

    frozen: `objective.frozen()` from before the engine was opened
    """
    for line in accepted:
        print(f"dromos: accepted: {line}", flush=True)
    if start is None or not start.was_written_by(context.folder):
        _begin_folder(context, objective, frozen, description)
    else:
        _resume_folder(context, start, total)


def _begin_folder(
    context: StageContext, objective: Objective, frozen: dict[str, Tensor], description: dict[str, Any]
) -> None:
    """resolved.yaml and frozen.safetensors of a new stage; deletes logs of an attempt without a checkpoint."""
    sync(context.run_dir)  # the launcher made the stage's folder, for its own logs
    _write_record(context)
    if frozen or description:  # a resume builds the encoder from the description, also if all of it trains
        used = objective.frozen()  # in the dtype of the engine, but without elements under ZeRO-3
        tensors = {name: tensor.to(used[name].dtype) for name, tensor in frozen.items()}
        write_frozen(context.frozen_path, tensors, description)
    for name in ("metrics.jsonl", "bad_samples.jsonl", "result.json"):
        (context.folder / name).unlink(missing_ok=True)


def _resume_folder(context: StageContext, start: Start, total: int) -> None:
    """Truncate the logs to the checkpoint's step, rewrite resolved.yaml and print what changed in it."""
    folder, step = context.folder, start.step
    if step < total:  # a finished stage whose train length grew is not finished any more
        (folder / "result.json").unlink(missing_ok=True)
    for name, line in (("metrics.jsonl", start.state.get("line")), ("bad_samples.jsonl", None)):
        for number in metrics_log.truncate(folder / name, step, line):
            print(f"dromos: warning: {folder / name}:{number}: a damaged line was left out", flush=True)
    record = context.record
    previous = read_record(folder) or record
    changed = compare_changeable_keys(previous, record)
    _write_record(context)
    print(f"dromos: {context.name} resumes after step {step}", flush=True)
    for line in changed:
        print(f"dromos: changed since it was saved: {line}", flush=True)
    for line in compare_versions(previous, record):
        print(f"dromos: warning: {line}", flush=True)


def write_left_out(context: StageContext, builders: dict[str, BatchBuilder]) -> None:
    """left_out.json, for the report: source -> reason -> files in its tars that are in no sample; on rank 0 only."""
    counts = {
        f"{stream}.{source}": manifest.left_out.counts
        for stream, builder in builders.items()
        for source, manifest in builder.manifests.items()
        if manifest.left_out.counts
    }
    path = context.folder / LEFT_OUT
    if counts:
        publish(path, json.dumps(counts, indent=1).encode())
    else:
        path.unlink(missing_ok=True)


def _write_record(context: StageContext) -> None:
    """resolved.yaml, which a resume, an evaluation and an export read."""
    publish(context.folder / "resolved.yaml", dump_plain(context.record).encode())


def make_evaluation(
    context: StageContext, objective: Objective, engine: Engine
) -> Callable[[], tuple[dict[str, float], dict[str, str]]]:
    """A function that returns the held-out metrics of the engine's current weights; collective.

    Beside them it returns the names of the tasks whose data could not be read, with the reasons.
    """
    tokenizer = optional_tokenizer(context.stage)

    def metrics() -> tuple[dict[str, float], dict[str, str]]:
        engine.train(False)
        failed: dict[str, str] = {}
        found = evaluate(objective, engine, context.stage, tokenizer, context.runtime, failed=failed)
        return flat_scalars(found), failed

    return metrics


def order_state(builders: dict[str, BatchBuilder], step: int) -> dict[str, Any]:
    """The data position after `step` steps, by stream, for state.json."""
    return {name: builder.order.state(step, builder.fingerprints) for name, builder in builders.items()}


def open_loader(context: StageContext, builders: dict[str, BatchBuilder]) -> Loader:
    """The loader of this rank; its workers start here."""
    from data_pipeline.loader.loader import LocalLoader, RayLoader

    settings = context.stage.loader
    kind = RayLoader if settings.backend == "ray" else LocalLoader
    return kind(
        [builder.spec for builder in builders.values()],
        context.runtime.rank,
        context.runtime.world_size,
        settings.workers,
        context.stage.train.micro_batch,
        builders,
        StallLimits(settings.stall_warn, settings.stall_error),
    )

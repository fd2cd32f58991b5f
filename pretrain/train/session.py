"""A stage set up for training on this rank: checked, built, resumed; and closed whatever happens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.errors import UserError
from data_pipeline.order.stream_order import StreamOrder
from data_pipeline.storage.files import publish
from data_pipeline.transforms.decode import decoder_versions
from data_pipeline.workers.watchdog import StallLimits
from pretrain.build.module_weights import load_into, read_frozen, read_state, write_frozen
from pretrain.build.objective import build, check_tokens, stage_tokenizer
from pretrain.build.streams import cache_settings, stage_specs
from pretrain.distributed.collectives import barrier, from_first
from pretrain.distributed.engine import Engine
from pretrain.distributed.engine import start as join
from pretrain.distributed.engine import stop as leave
from pretrain.evaluate.suite import check_held_out, evaluate, flat
from pretrain.recipe.checks import world_size_check
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.fields import Length
from pretrain.recipe.lengths import check_ends, length_steps, total_steps
from pretrain.recipe.load import load_recipe, run_dir
from pretrain.recipe.schema import TrainStage
from pretrain.run import metrics_log
from pretrain.run.identity import check_run_folder, compare_free, compare_versions, read_record
from pretrain.run.lock import FolderLock
from pretrain.train import checkpoint
from pretrain.train.resume import Start, check_length, find_start, resume_data, same_order
from pretrain.train.schedule import peak_rate
from pretrain.train.stop_flag import StopFlag
from pretrain.train.trainer import Plan, Trainer, write_result


class Session:
    """Owns everything that one rank opens for one stage."""

    def __init__(self, recipe_path: str, name: str, overrides: Sequence[str], flag: StopFlag) -> None:
        self.lock: FolderLock | None = None
        self.trainer: Trainer | None = None
        self.name = name
        self.recipe = load_recipe(recipe_path, list(overrides), name)
        stage = self.recipe.stages[name]
        if not isinstance(stage, TrainStage):
            raise UserError(
                f"stage {name} is a merge, not a training: dromos run {recipe_path} --stage {name}"
            )
        self.stage = stage
        self.run_dir = run_dir(self.recipe)
        self.folder = self.run_dir / name
        self.seed = self.recipe.run.seed
        self.flag = flag
        if stage.engine.deterministic:
            torch.use_deterministic_algorithms(True)
        self.runtime = join()
        world_size_check(stage, self.runtime.world_size)
        check_run_folder(self.run_dir, self.recipe, name, self.runtime.world_size)
        if self.runtime.rank == 0:
            self.lock = FolderLock(self.folder)
        barrier()  # no rank may look for a checkpoint that a previous writer is still writing
        check_run_folder(
            self.run_dir, self.recipe, name, self.runtime.world_size
        )  # it may have been another recipe's

    def train(self) -> bool:
        """True when the stage is at its end, False when it saved because it was asked to stop."""
        stage, runtime = self.stage, self.runtime
        began = time.monotonic()
        frozen_path = self.folder / "frozen.safetensors"
        start = find_start(stage, self.folder, runtime.world_size)
        kept = start.frozen if start is not None else None
        objective, described = build(stage, self.name, self.seed, self.run_dir, kept)
        if getattr(objective, "tower", None) is not None:
            objective.tower.to(runtime.device)
        specs = stage_specs(stage, self.seed, self.name, objective.streams)
        if start is not None and stage.continue_ is not None:
            specs = same_order(specs, start.state["order"], stage.continue_)
        cache = cache_settings(stage)
        builders = {spec.name: BatchBuilder(spec, cache=cache) for spec in specs}
        for builder in builders.values():
            builder.check()  # a tar without images is named before the first step; the launcher looks earlier
        accepted: list[str] = []
        if start is not None:
            builders, accepted = resume_data(builders, start.state["order"], self.recipe.run.accept_change)
        plan = self.plan(builders[objective.main].order)
        for line in check_ends({name: builder.order for name, builder in builders.items()}, plan.total):
            if runtime.rank == 0:
                print(f"dromos: {line}", flush=True)
        if start is not None:
            check_length(start, stage, self.folder, plan.total)
        check_held_out(objective, stage)
        check_tokens(stage, objective, builders)
        self.load_weights(objective, start)
        engine = Engine(
            objective.model,
            stage.engine.zero,
            stage.engine.dtype,
            stage.optimizer.betas,
            stage.optimizer.eps,
            stage.optimizer.weight_decay,
            stage.optimizer.clip,
            runtime,
        )
        if start is not None:
            engine.load(start.checkpoint.parent, start.checkpoint.name)
        if runtime.rank == 0:
            for line in accepted:
                print(f"dromos: accepted: {line}", flush=True)
            if start is None or start.checkpoint.parent.parent != self.folder:
                self.begin(objective, described, frozen_path)
            else:
                self.go_on(start.step, plan.total)
        first = start.step if start is not None else 0
        tokenizer = stage_tokenizer(stage)

        def figures() -> dict[str, Any]:
            engine.train(False)
            return flat(evaluate(objective, engine, stage, tokenizer, runtime))

        def order_state(step: int) -> dict[str, Any]:
            return {
                name: builder.order.state(step, builder.fingerprints) for name, builder in builders.items()
            }

        loader = self.loader(builders)
        barrier()  # frozen.safetensors is there
        self.trainer = Trainer(
            stage,
            self.folder,
            objective,
            engine,
            loader,
            plan,
            runtime,
            self.flag,
            order_state,
            figures,
            # Replaced samples of the data before a change say nothing of the data now.
            before=start.state if start is not None and not accepted else None,
            frozen_hash=from_first(checkpoint.hash_file(frozen_path)),
        )
        if first >= plan.total:
            self.trainer.refuse_too_many(first)  # a stage that was stopped at its last step is not done
        finished = self.trainer.run(first) if first < plan.total else True
        if finished and runtime.rank == 0:
            rows = metrics_log.read(self.folder / "metrics.jsonl")
            last = rows[-1].get("eval", {}) if rows else {}
            write_result(self.folder, plan.total, time.monotonic() - began, last)
        return finished

    def plan(self, order: StreamOrder) -> Plan:
        """Of the main stream's order, which knows what the steps before a change of the batch had."""
        stage, epoch, largest = self.stage, order.samples_per_epoch(), order.batches.largest

        def every(length: Length) -> int:
            """Intervals in samples are those of the largest batch."""
            return max(1, length_steps(length, largest, epoch))

        return Plan(
            total=total_steps(stage, epoch, order),
            warmup=length_steps(stage.schedule.warmup, order, epoch),
            peak_rate=peak_rate(stage.optimizer, largest),
            save_every=every(stage.checkpoint.every),
            evaluate_every=every(stage.eval.every) if stage.eval.every is not None else None,
            hours=stage.train.hours,
        )

    def load_weights(self, objective: Any, start: Start | None) -> None:
        """`init` gives weights to a new stage; one that goes on takes the frozen tensors beside its checkpoint."""
        if start is not None:
            if checkpoint.hash_file(start.frozen) != start.state.get("frozen"):
                raise UserError(
                    f"{start.frozen} is not the file that {start.checkpoint.name} was saved with; put it back, or "
                    f"delete {start.checkpoint.parent.parent} to start again"
                )
            tensors, _ = read_frozen(start.frozen)
            own = dict(objective.model.named_parameters())
            with torch.no_grad():
                for name, tensor in tensors.items():
                    if name in own:
                        own[name].copy_(tensor)
        elif self.stage.init is not None:
            loaded = load_into(objective.model, read_state(self.stage.init, self.run_dir), self.stage.init)
            if self.runtime.rank == 0 and loaded.new:
                new = sorted({name.split(".")[0] for name in loaded.new})
                print(f"dromos: init {self.stage.init}: newly initialised: {', '.join(new)}", flush=True)

    def begin(self, objective: Any, described: dict[str, Any], frozen: Path) -> None:
        """What a new stage writes before its first step."""
        self.write_record()
        tensors = objective.frozen()
        if tensors:
            write_frozen(frozen, tensors, described)
        for name in ("metrics.jsonl", "bad_samples.jsonl", "result.json"):
            (self.folder / name).unlink(missing_ok=True)

    def write_record(self) -> None:
        """resolved.yaml: what the stage is, for a resume, an evaluation and an export."""
        publish(self.folder / "resolved.yaml", dump_plain(self.record).encode())

    @property
    def record(self) -> dict[str, Any]:
        return stage_record(self.recipe, self.name) | {"versions": decoder_versions()}

    def go_on(self, step: int, total: int) -> None:
        """Cut the stage's own logs at the step it goes on from, and record what it goes on with."""
        if step < total:  # a longer training than the one that had finished
            (self.folder / "result.json").unlink(missing_ok=True)
        metrics_log.cut(self.folder / "metrics.jsonl", step)
        metrics_log.cut(self.folder / "bad_samples.jsonl", step)
        now = self.record
        before = read_record(self.folder) or now
        changed = compare_free(before, now)
        self.write_record()
        print(f"dromos: {self.name} goes on after step {step}", flush=True)
        for line in changed:
            print(f"dromos: changed since it was saved: {line}", flush=True)
        for line in compare_versions(before, now):
            print(f"dromos: warning: {line}", flush=True)

    def loader(self, builders: dict[str, BatchBuilder]) -> Any:
        settings = self.stage.loader
        given = (
            [builder.spec for builder in builders.values()],
            self.runtime.rank,
            self.runtime.world_size,
            settings.workers,
            self.stage.train.micro_batch,
            builders,
            StallLimits(settings.stall_warn, settings.stall_error),
        )
        if settings.backend == "ray":
            from data_pipeline.loader.loader import RayLoader

            return RayLoader(*given)
        from data_pipeline.loader.loader import LocalLoader

        return LocalLoader(*given)

    def close(self) -> None:
        if self.trainer is not None:
            self.trainer.close()
        if self.lock is not None:
            self.lock.release()
        leave()

"""One training stage on one rank: opens it, trains it, and closes it whatever happens."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from data_pipeline.errors import UserError
from pretrain.distributed.collectives import barrier, from_rank_0
from pretrain.distributed.engine import join_process_group, leave_process_group
from pretrain.recipe.load import load_recipe, run_dir
from pretrain.recipe.schema import TrainStage
from pretrain.run import metrics_log
from pretrain.run.identity import check_run_folder
from pretrain.run.lock import FolderLock
from pretrain.train import stage_setup as setup
from pretrain.train.checkpoint import hash_file
from pretrain.train.resume import find_start
from pretrain.train.stop_signals import StopFlag
from pretrain.train.trainer import Trainer, write_result


class Session:
    """A training stage opened on one rank.

    The constructor checks recipe, world size and run folder, joins the process group and takes the stage's lock. It
    builds no model and writes only the file of the lock. Raises UserError. `close` releases lock, trainer and process
    group.
    """

    def __init__(self, recipe_path: str, name: str, overrides: Sequence[str], flag: StopFlag) -> None:
        self.lock: FolderLock | None = None
        self.trainer: Trainer | None = None
        self.flag = flag
        recipe = load_recipe(recipe_path, list(overrides), name)
        stage = recipe.stages[name]
        if not isinstance(stage, TrainStage):
            raise UserError(
                f"stage {name} is a merge stage, not a training stage; run it with: "
                f"dromos run {recipe_path} --stage {name}"
            )
        folder = run_dir(recipe)
        if stage.engine.deterministic:
            torch.use_deterministic_algorithms(True)
        runtime = join_process_group()
        self.context = setup.StageContext(recipe, name, stage, folder, runtime)
        check_run_folder(folder, recipe, name, runtime.world_size)
        if runtime.rank == 0:
            self.lock = FolderLock(self.context.folder)
        barrier()  # no rank may look for a checkpoint that a previous writer is still writing
        # Check again while holding the lock: another run may have written before.
        check_run_folder(folder, recipe, name, runtime.world_size)

    def train(self) -> bool:
        """Train to the end of the stage, from the newest checkpoint.

        Returns True at the end of the stage, False when it saved and stopped on a signal or at train.hours. Raises
        UserError, and what `Trainer.run` raises.
        """
        context, stage, runtime = self.context, self.context.stage, self.context.runtime
        began = time.monotonic()
        # 1. Start: own newest checkpoint, else that of `continue:`, else step 0.
        start = find_start(stage, context.folder, runtime.world_size)
        first = start.step if start is not None else 0
        if start is not None:
            setup.check_frozen(start)
        # 2. Model with fresh weights, data at its position, lengths in steps; then the checks that need all three.
        built = setup.build_objective(context, start)
        objective = built.objective
        builders, accepted = setup.open_streams(context, objective, start)
        plan = setup.make_plan(stage, builders[objective.main].order)
        setup.check_stage(context, objective, builders, plan.total, start)
        # 3. Weights: `init` or frozen tensors into the module, then the checkpoint through the engine.
        setup.load_weights(context, built, start)
        # Before the engine: ZeRO-3 leaves tensors without elements. Rank 0 writes them.
        frozen = objective.frozen() if runtime.rank == 0 else {}
        engine = setup.open_engine(context, objective, start)
        # 4. Run folder: the first files that are written.
        if runtime.rank == 0:
            setup.prepare_folder(context, objective, frozen, built.description, start, plan.total, accepted)
            setup.write_left_out(context, builders)
        del frozen  # whole tensors, of which ZeRO-3 keeps a part per rank during the training
        # 5. Evaluation and loader. After the barrier, the files of the run folder exist on every rank.
        evaluate = setup.make_evaluation(context, objective, engine)
        loader = setup.open_loader(context, builders)
        barrier()
        # 6. Train. After an accepted data change the counts of replaced samples start at zero.
        self.trainer = Trainer(
            stage,
            context.folder,
            objective,
            engine,
            loader,
            plan,
            runtime,
            self.flag,
            partial(setup.order_state, builders),
            evaluate,
            previous_state=start.state if start is not None and not accepted else None,
            frozen_hash=from_rank_0(hash_file(context.frozen_path) if runtime.rank == 0 else None),
        )
        if first >= plan.total:  # a run stopped by a bad-sample limit at its last step is not finished
            self.trainer.check_bad(first)
        # The collector was off since `main`; what the start created is excluded from every later collection.
        gc.freeze()
        gc.enable()
        finished = self.trainer.run(first)
        # 7. Mark the stage as finished.
        if finished and runtime.rank == 0:
            rows = metrics_log.read(context.folder / "metrics.jsonl")
            metrics = rows[-1].get("eval", {}) if rows else {}
            write_result(context.folder, plan.total, time.monotonic() - began, metrics)
        return finished

    def close(self) -> None:
        """Stop the loader's workers, close the logs, release the lock and leave the process group, whatever fails."""
        with ExitStack() as stack:
            stack.callback(leave_process_group)
            if self.lock is not None:
                stack.callback(self.lock.release)
            if self.trainer is not None:
                self.trainer.close()
